"""The expressions that export-torchvision prints build models that take the arrays of the file."""

import dataclasses

import pytest
import torch

from maskrcnn_jax.config import load_config, to_options
from maskrcnn_jax.models.unfilled import make_unfilled
from maskrcnn_jax.options import DataOptions, Options
from maskrcnn_jax.weights.constructor import constructor
from maskrcnn_jax.weights.torchvision import entries
from tools.torchvision_reference import import_torchvision

CHANGES = {"box_score_thresh": 0.3, "anchor_sizes": (16, 32, 64, 128, 256), "anchor_scales": (1.0, 1.5)}


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        ("torchvision_r50_fpn", {}),
        ("torchvision_r50_fpn_v2", {"box_detections_per_img": 50}),
        ("torchvision_r50_fpn", CHANGES),
        ("torchvision_r50_fpn", {"backbone": "resnet18"}),
    ],
)
def test_the_constructor_has_the_arrays_of_the_file(config, changes):
    options = to_options(load_config(config))
    options = dataclasses.replace(options, model=dataclasses.replace(options.model, **changes))
    expression = constructor(options, 7)
    torchvision = import_torchvision()
    with torch.device("meta"):
        theirs = eval(expression, {"torchvision": torchvision})
    arrays = {name for name in theirs.state_dict() if not name.endswith("num_batches_tracked")}
    ours = {entry.key for entry in entries(make_unfilled(7, options.model))}
    assert {name for name in ours if not name.endswith("num_batches_tracked")} == arrays
    assert theirs.roi_heads.box_predictor.cls_score.out_features == 7
    assert theirs.roi_heads.score_thresh == options.model.box_score_thresh
    assert theirs.roi_heads.detections_per_img == options.model.box_detections_per_img
    sizes = tuple(tuple(size * scale for scale in options.model.anchor_scales) for size in options.model.anchor_sizes)
    assert theirs.rpn.anchor_generator.sizes == sizes


def test_sides_of_images_are_those_of_the_config():
    options = Options(data=DataOptions(short_side=512, long_side=1024))
    assert "min_size=512, max_size=1024" in constructor(options, 3)


@pytest.mark.parametrize(
    "changes", [{"backbone": "convnext_tiny"}, {"fpn_channels": 64}, {"head_norm": "group"}, {"mask_deconv": False}]
)
def test_networks_that_torchvision_does_not_build_have_no_constructor(changes):
    options = to_options(load_config("torchvision_r50_fpn"))
    assert constructor(dataclasses.replace(options, model=dataclasses.replace(options.model, **changes)), 3) is None
