"""The whole comparison with torchvision, as tools/compare_torch.py runs it."""

import json

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
from maskrcnn_jax.config import load_config  # noqa: E402
from maskrcnn_jax.models.mask_rcnn import MaskRCNN  # noqa: E402
from maskrcnn_jax.options import ModelOptions  # noqa: E402
from tools.compare_torch import compare  # noqa: E402
from tools.comparison.comparison_page import Comparison  # noqa: E402
from tools.comparison.pair import read_images  # noqa: E402

CONFIGS = {"v1": "torchvision_r50_fpn", "v2": "torchvision_r50_fpn_v2"}
NARROW = {
    "stem_channels": 8,
    "stage_channels": 32,
    "bottleneck_channels": 8,
    "fpn_channels": 16,
    "mask_channels": 16,
    "anchor_sizes": (16, 32, 64, 96, 128),
    "rpn_pre_nms_top_n_train": 100,
    "rpn_post_nms_top_n_train": 100,
    "rpn_pre_nms_top_n_test": 100,
    "rpn_post_nms_top_n_test": 100,
    "box_batch_size_per_image": 32,
}


def options_of(version: str, **changes) -> ModelOptions:
    options = load_config(CONFIGS[version]).model.to_dict() | {"norm_eps": 1e-5} | changes
    if "fpn_channels" in changes:
        options["box_fc_channels"] = (32,) if version == "v2" else (32, 32)
        options["box_conv_channels"] = (16, 16) if version == "v2" else ()
    return ModelOptions(**options)


def compare_on(coco_dir, options, dtype, num_images=2, **settings):
    images = read_images(coco_dir / "val2017", num_images)
    with jax.enable_x64(dtype == "float64"):
        return compare(options, images, dtype=dtype, **settings)


SMALL = {"num_classes": 7, "min_size": 96, "max_size": 128}


@pytest.mark.slow
def test_a_small_network_agrees_in_float64_up_to_its_detections(coco_dir):
    options = options_of("v2", **NARROW, backbone="resnet18")
    result = compare_on(coco_dir, options, "float64", num_steps=0, **SMALL)
    assert result.ok, result.table()


@pytest.mark.slow
@pytest.mark.parametrize(("version", "batch_size"), [("v1", 1), ("v2", 2)])
def test_a_narrow_resnet50_agrees_in_float64_through_ten_steps(coco_dir, version, batch_size):
    options = options_of(version, **NARROW)
    result = compare_on(coco_dir, options, "float64", batch_size=batch_size, num_steps=10, **SMALL)
    assert result.ok, result.table()
    sections = {row.section for row in result.rows}
    assert len(sections) == 8, sections


@pytest.mark.slow
@pytest.mark.parametrize(("version", "flips"), [("v1", 0), ("v2", 9)])
def test_the_full_network_agrees_in_float32(optimized, coco_dir, version, flips):
    """In version 2 single ReLUs round to either side of zero, see docs/numerics.md: in three channels, at most."""
    result = compare_on(coco_dir, options_of(version), "float32", num_steps=1)
    beyond = [row for row in result.rows if not row.ok]
    assert len(beyond) <= flips, result.table()
    assert all(row.section == "gradients" and row.max_rel < 1e-2 for row in beyond), result.table()


@pytest.mark.slow
def test_a_difference_is_found(coco_dir, monkeypatch):
    """Half a pixel in RoIAlign: what follows it is too far, what precedes it is not."""
    pool = MaskRCNN.pool
    monkeypatch.setattr(MaskRCNN, "pool", lambda self, x, boxes, *args: pool(self, x, boxes + 0.5, *args))
    options = options_of("v1", **NARROW, backbone="resnet18")
    result = compare_on(coco_dir, options, "float64", num_steps=0, **SMALL)
    assert not result.ok
    failed = {row.name for row in result.rows if not row.ok and row.section.startswith("stages")}
    assert failed == {"RoIAlign 7x7", "RoIAlign 14x14"}


def test_rows_keep_the_worst_batch_and_tell_shapes_and_nans_apart(tmp_path):
    result = Comparison()
    result.add("a", "x", np.array([1.0, 2.0]), np.array([1.0, 2.0]), 1e-9)
    result.add("a", "x", np.array([1.0, 2.1]), np.array([1.0, 2.0]), 1e-9)
    result.add("a", "x", np.array([1.0, 2.0]), np.array([1.0, 2.0]), 1e-9)
    (row,) = result.rows
    assert row.where == (1,)
    assert row.max_rel == pytest.approx(0.05)
    assert not result.ok
    for name, ours in (("nan", np.array([np.nan, 2.0])), ("shape", np.zeros(3))):
        other = Comparison()
        other.add("a", name, ours, np.array([1.0, 2.0]), 1e9)
        assert not other.ok, name
    assert not Comparison().ok, "nothing compared is no success"
    result.write_json(tmp_path / "rows.json")
    assert {"name", "ours", "reference", "max_abs", "max_rel", "ok"} <= json.loads(
        (tmp_path / "rows.json").read_text()
    )[0].keys()
    result.write_html(tmp_path / "page.html", "title <of> it")
    page = (tmp_path / "page.html").read_text()
    assert "title &lt;of&gt; it" in page
    assert "<svg" in page
    assert "TOO FAR" in result.table()
