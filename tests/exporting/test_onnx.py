"""ONNX files, run by both runtimes, beside the model that they were exported from."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import jax
import numpy as np
import onnx
import pytest
from pycocotools import mask as coco_mask

import maskrcnn_jax as mr
from maskrcnn_jax.data.categories import Categories
from maskrcnn_jax.data.dataset import load_dataset
from maskrcnn_jax.data.shapes import write_dataset
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.exporting.int8 import quantize_onnx
from maskrcnn_jax.exporting.onnx_file import export_onnx
from maskrcnn_jax.inference.predictor import Predictor
from maskrcnn_jax.inference.results import unpad
from maskrcnn_jax.inference.runtimes import RUNTIMES, OnnxDetect
from maskrcnn_jax.options import DataOptions, Options
from maskrcnn_jax.structures import Batch
from tests.exporting.agreement import check_agreement
from tests.models.tiny import tiny_model
from tools.run_exported import run_lengths

ROOT = Path(__file__).parents[2]
CATEGORIES = Categories.create([900, 7, 12, 13], ["heart", "circle", "star", "ring"])
SIZES = np.array([[64, 96], [50, 70], [1, 1]], np.int32)  # in the last, no object is large enough
WIDE = {"fpn_channels": 32, "mask_channels": 32, "rpn_channels": 16}
NETWORKS = {
    "torchvision v1": {},
    "torchvision v2": {
        "head_norm": "batch",
        "rpn_conv_depth": 2,
        "box_conv_channels": (16, 32),
        "box_fc_channels": (32,),
    },
    "detectron2": {"roi_aligned": True, "roi_sampling_ratio": 0, "exact_anchors": True, "anchor_scales": (1.0, 1.5)},
    "bottlenecks": {"backbone": "resnet50", "stride_in_1x1": True, "norm": "batch", "bottleneck_channels": 8},
    "group norms, one box": {**WIDE, "head_norm": "group", "box_conv_channels": (32,), "cls_agnostic_bbox_reg": True},
    "focal loss, RoIPool": {
        "classification_loss": "focal",
        "roi_operator": "pool",
        "mask_deconv": False,
    },
    "suppression among all classes": {"box_nms_class_agnostic": True},
    "one box, suppression among all classes": {"cls_agnostic_bbox_reg": True, "box_nms_class_agnostic": True},
    "convnext": {"backbone": "convnext_tiny"},
    "mobilenet": {"backbone": "mobilenet_v3_large", "in_channels": 4},
}


def predictor_of(**changes):
    model = tiny_model(box_min_size=1.5, **changes)
    return Predictor(model, CATEGORIES, Options(model=model.options, data=DataOptions(short_side=64, long_side=96)))


def images_of(predictor, seed=0):
    shape = (len(SIZES), 64, 96, predictor.options.model.in_channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if i else ()) for i, name in enumerate(NETWORKS)]
)
def test_both_runtimes_find_what_the_model_finds(name, tmp_path):
    predictor = predictor_of(**NETWORKS[name])
    images = images_of(predictor)
    expected = jax.device_get(predictor.detect(images, SIZES))
    assert expected.valid[0].any() and not expected.valid[2].any()
    export_onnx(predictor, tmp_path / "model.onnx")
    for runtime in RUNTIMES:
        detect = OnnxDetect(tmp_path / "model.onnx", runtime)
        check_agreement(detect(images, SIZES), expected)
        # One image, and one without any detection, whose heads get no boxes at all.
        for i in (0, 2):
            check_agreement(detect(images[i : i + 1], SIZES[i : i + 1]), [rows[i : i + 1] for rows in expected])


def test_images_of_other_sizes_need_no_other_file(tmp_path):
    predictor = predictor_of()
    export_onnx(predictor, tmp_path / "model.onnx")
    images = np.random.default_rng(0).integers(0, 256, (1, 160, 128, 3), dtype=np.uint8)
    sizes = np.array([[150, 128]], np.int32)
    for runtime in RUNTIMES:
        check_agreement(
            OnnxDetect(tmp_path / "model.onnx", runtime)(images, sizes),
            jax.device_get(predictor.detect(images, sizes)),
        )


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model and its file."""
    predictor, path = predictor_of(), tmp_path_factory.mktemp("onnx") / "model.onnx"
    export_onnx(predictor, path)
    return predictor, path


def photos():
    rng = np.random.default_rng(1)
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((90, 100), (64, 64))]


def test_a_file_is_loaded_and_predicts_like_a_model(exported):
    predictor, path = exported
    expected = predictor.predict(photos(), min_score=0)
    assert any(len(found) > 1 for found in expected)
    for runtime in RUNTIMES:
        model = pickle.loads(pickle.dumps(mr.load(path, runtime=runtime)))
        assert model.options == predictor.options and model.categories == CATEGORIES
        for ours, theirs in zip(model.predict(photos(), min_score=0), expected, strict=True):
            assert ours.names == theirs.names
            np.testing.assert_allclose(ours.boxes, theirs.boxes, atol=0.05)
            np.testing.assert_allclose(ours.scores, theirs.scores, atol=1e-4)
            assert (ours.masks != theirs.masks).mean() < 1e-3


def test_boxes_of_the_file_are_in_pixels_of_the_original_image(exported):
    import onnxruntime

    predictor, path = exported
    images, original = images_of(predictor), np.array([[128, 288], [100, 70], [4, 4]], np.int32)
    session = onnxruntime.InferenceSession(path)
    inputs = {"images": images, "sizes": SIZES, "original_sizes": original}
    boxes, valid = session.run(["boxes", "valid"], inputs)
    expected = unpad(jax.device_get(predictor.detect(images, SIZES)), SIZES, original)
    for i, instances in enumerate(expected):
        np.testing.assert_allclose(boxes[i][valid[i]], instances.boxes, atol=0.05)


def test_the_file_says_what_its_labels_mean_and_how_images_are_prepared(exported):
    metadata = {entry.key: entry.value for entry in onnx.load(exported[1]).metadata_props}
    about = json.loads(metadata["model.json"])
    assert about["categories"][0] == {"label": 1, "id": 7, "name": "circle"}
    assert (about["short_side"], about["long_side"], about["resize"], about["any_size"]) == (64, 96, "uint8", True)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_file_of_one_size_pads_smaller_images_and_refuses_larger_ones(runtime, exported, tmp_path):
    predictor, _ = exported
    export_onnx(predictor, tmp_path / "fixed.onnx", sizes=[(64, 96)])
    model = mr.load(tmp_path / "fixed.onnx", runtime=runtime)
    assert len(model.predict(np.zeros((64, 64, 3), np.uint8), min_score=0)) >= 0
    with pytest.raises(UserError, match="padded to 96x64 do not fit .* is for 64x96; export it for any size"):
        model.predict(np.zeros((90, 60, 3), np.uint8))


def model_of_another_origin():
    helper = onnx.helper
    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "relu", [x], [y])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_file_in_capitals_is_read_and_labels_without_a_category_are_dropped(runtime, tmp_path):
    model = tiny_model(num_classes=9)
    options = Options(model=model.options, data=DataOptions(short_side=64, long_side=96))
    names = "heart", "circle"
    predictor = Predictor(model, Categories((5, 6), names, (2, 4), 9), options)
    export_onnx(predictor, tmp_path / "model.onnx")
    (tmp_path / "model.onnx").rename(tmp_path / "MODEL.ONNX")
    loaded = mr.load(tmp_path / "MODEL.ONNX", runtime=runtime)
    assert loaded.categories == predictor.categories
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    assert loaded.predict(image, min_score=0).names == predictor.predict(image, min_score=0).names


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_several_threads_share_a_model(runtime, exported):
    detect = OnnxDetect(exported[1], runtime)
    images = np.random.default_rng(0).integers(0, 256, (8, 1, 64, 96, 3), dtype=np.uint8)
    alone = [detect(image, SIZES[:1]) for image in images]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(detect, images, [SIZES[:1]] * 8))
    for ours, theirs in zip(together, alone, strict=True):
        np.testing.assert_array_equal(ours.scores, theirs.scores)
        np.testing.assert_array_equal(ours.boxes, theirs.boxes)


def test_a_pickled_model_is_found_from_another_folder(exported, tmp_path, monkeypatch):
    shutil.copy(exported[1], tmp_path / "model.onnx")
    monkeypatch.chdir(tmp_path)
    content = pickle.dumps(mr.load("model.onnx"))
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert pickle.loads(content).categories == CATEGORIES


@pytest.mark.parametrize("is_able", [True, False])
def test_a_processor_without_bfloat16_is_told_of(exported, monkeypatch, caplog, is_able):
    monkeypatch.setattr("maskrcnn_jax.inference.runtimes.has_bfloat16", lambda: is_able)
    mr.load(exported[1], runtime="openvino", bf16=True)
    assert ("it computes in float32" in caplog.text) is not is_able


def test_what_an_exported_file_cannot_do_is_refused(exported, tmp_path, monkeypatch):
    predictor, path = exported
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    onnx.save(model_of_another_origin(), tmp_path / "other.onnx")
    (tmp_path / "part.onnx").write_bytes(path.read_bytes()[:-100])
    (tmp_path / "model.mrcnn").write_bytes(b"PK")
    for arguments, said in (
        ({"source": path, "config": "shapes"}, "has its own config and categories"),
        ({"source": path, "runtime": "onnxruntime", "bf16": True}, "ONNX Runtime does not compute in bfloat16"),
        ({"source": path, "runtime": "tensorrt"}, "use openvino or onnxruntime"),
        ({"source": tmp_path / "broken.onnx", "runtime": "onnxruntime"}, "cannot be read by onnxruntime"),
        ({"source": tmp_path / "broken.onnx", "runtime": "openvino"}, "cannot be read by openvino"),
        ({"source": tmp_path / "part.onnx", "runtime": "onnxruntime"}, "Protobuf parsing failed.*; export it again"),
        ({"source": tmp_path / "part.onnx", "runtime": "openvino"}, r"openvino \(Model can't be parsed\); export it"),
        ({"source": tmp_path / "other.onnx", "runtime": "onnxruntime"}, "is of another origin"),
        ({"source": tmp_path / "other.onnx", "runtime": "openvino"}, "is of another origin"),
        ({"source": tmp_path / "model.mrcnn"}, "without this package, see tools/run_exported.py"),
        ({"source": tmp_path / "absent.onnx"}, "there is no file"),
        ({"source": tmp_path, "runtime": "openvino"}, "runs in JAX"),
    ):
        with pytest.raises(UserError, match=said):
            mr.load(**arguments)
    with pytest.raises(UserError, match="detects only as it was exported"):
        mr.load(path).network  # noqa: B018
    with pytest.raises(UserError, match="one size or of any, not of 2"):
        export_onnx(predictor, tmp_path / "new.onnx", sizes=[(64, 96), (96, 64)])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"openvino is not installed; run pip install '\.\[openvino\]' in the clone"):
        mr.load(path, runtime="openvino")


def test_soft_suppression_is_refused(tmp_path):
    with pytest.raises(UserError, match="no soft suppression, but model.box_nms_method is linear; export with hard"):
        export_onnx(predictor_of(box_nms_method="linear"), tmp_path / "model.onnx")


def test_a_backbone_of_the_users_own_is_refused(tmp_path):
    predictor = predictor_of()
    own = type("Own", (), {"out_channels": (8, 16, 32, 64)})()
    predictor.network.backbone = own
    with pytest.raises(UserError, match="a backbone of your own, Own, cannot be exported as ONNX"):
        export_onnx(predictor, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


# Runs a file where this package cannot be imported, and writes down what it prints.
ALONE = """
import runpy, sys
sys.modules["maskrcnn_jax"] = None
sys.argv = ["run_exported.py", "model.onnx", "photo.png", "--min_score=0", *sys.argv[1:]]
runpy.run_path("run_exported.py", run_name="__main__")
"""


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_file_runs_without_the_package_and_gives_masks_and_pictures(runtime, exported, tmp_path):
    predictor, path = exported
    image = photos()[0]
    cv2.imwrite(str(tmp_path / "photo.png"), image[..., ::-1])
    shutil.copy(path, tmp_path / "model.onnx")
    shutil.copy(ROOT / "tools" / "run_exported.py", tmp_path)
    expected = predictor.predict(image, min_score=0)
    for form in ("rle", "polygons"):
        done = subprocess.run(
            [sys.executable, "-c", ALONE, f"--masks={form}", f"--runtime={runtime}", "--pictures=drawn"],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": ""},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        rows = json.loads(done.stdout)["objects"]
        assert [row["name"] for row in rows] == expected.names
        for row, mask in zip(rows, expected.masks, strict=True):
            found = row["segmentation"]
            if form == "rle":
                found = coco_mask.decode(coco_mask.frPyObjects(found, *image.shape[:2]))
                assert (found != mask).mean() < 1e-3
            elif found:
                found = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(found, *image.shape[:2])))
                # Polygons run through the centres of the cells at the border, and fill holes.
                assert found.sum() > 0
    assert (cv2.imread(str(tmp_path / "drawn" / "photo.png"))[..., ::-1] != image).any()


@pytest.mark.parametrize("rows", [[0b00, 0b11], [0b11, 0b00], [0b11, 0b11], [0b00, 0b00], [0b10, 0b01]])
def test_run_lengths_are_cocos(rows):
    mask = np.array([[row >> i & 1 for i in (1, 0)] for row in rows], bool)
    decoded = coco_mask.decode(coco_mask.frPyObjects(run_lengths(mask), 2, 2))
    np.testing.assert_array_equal(decoded.astype(bool), mask)


def test_eight_bits_find_nearly_the_same_in_a_quarter_of_the_space(exported, tmp_path):
    predictor, path = exported
    shutil.copy(path, tmp_path / "model.onnx")
    images = images_of(predictor)
    batch = Batch(images, SIZES, SIZES, np.arange(3, dtype=np.int32), np.array([True, True, False]), None)
    quantize_onnx(tmp_path / "model.onnx", [batch])
    kinds = [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node]
    assert kinds.count("QuantizeLinear") > 20
    assert (tmp_path / "model.onnx").stat().st_size < 0.5 * path.stat().st_size
    expected = predictor.detect(images, SIZES)
    for runtime in RUNTIMES:
        model = mr.load(tmp_path / "model.onnx", runtime=runtime)
        assert model.options == predictor.options
        scores = model.detect(images, SIZES).scores
        np.testing.assert_allclose(scores[0, 0], np.asarray(expected.scores)[0, 0], atol=0.2)
    with pytest.raises(UserError, match="there is no image to measure activations on"):
        quantize_onnx(path, [batch._replace(valid=np.zeros(3, bool))])


def test_eight_bits_for_one_size_are_measured_on_padded_images(tmp_path):
    predictor = predictor_of()
    export_onnx(predictor, tmp_path / "fixed.onnx", sizes=[(96, 96)])
    images = images_of(predictor)
    batch = Batch(images, SIZES, SIZES, np.arange(3, dtype=np.int32), np.ones(3, bool), None)
    quantize_onnx(tmp_path / "fixed.onnx", [batch])
    assert OnnxDetect(tmp_path / "fixed.onnx")(images, SIZES).valid[0].any()
    larger = batch._replace(images=np.zeros((3, 128, 96, 3), np.uint8))
    export_onnx(predictor, tmp_path / "fixed.onnx", sizes=[(96, 96)])
    with pytest.raises(UserError, match="padded to 128x96 do not fit the exported file, which is for 96x96"):
        quantize_onnx(tmp_path / "fixed.onnx", [larger])


@pytest.mark.slow
def test_an_exported_file_is_evaluated_like_the_model(tmp_path):
    write_dataset(tmp_path / "shapes", num_train=1, num_val=3, image_size=64, seed=1)
    categories = load_dataset(DataOptions(coco_dir=str(tmp_path / "shapes")), "val2017").categories
    model = tiny_model(num_classes=categories.num_classes)
    options = Options(model=model.options, data=DataOptions(short_side=64, long_side=64), eval_batch_size=2)
    predictor = Predictor(model, categories, options)
    export_onnx(predictor, tmp_path / "model.onnx")
    dataset = tmp_path / "shapes"
    ours = mr.evaluate(mr.load(tmp_path / "model.onnx"), dataset)
    theirs = mr.evaluate(predictor, dataset)
    assert len(ours.results) == len(theirs.results) > 3
    assert abs(ours.metrics["bbox_AR100"] - theirs.metrics["bbox_AR100"]) < 0.02
    with pytest.raises(UserError, match="as many detections as it was exported for"):
        mr.evaluate(mr.load(tmp_path / "model.onnx"), dataset, max_detections=3)
