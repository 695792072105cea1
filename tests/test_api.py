"""Models in a few lines of Python, from a run or from weights."""

import contextlib
import dataclasses
import json
import logging
import pickle
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import optax
import pytest
from pycocotools import mask as coco_mask

import maskrcnn_jax as mr
from maskrcnn_jax.api import evaluation_options, find_options
from maskrcnn_jax.config import to_options
from maskrcnn_jax.data.categories import Categories
from maskrcnn_jax.data.shapes import write_dataset
from maskrcnn_jax.distributed import make_mesh
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.evaluation.coco_metrics import format_table
from maskrcnn_jax.evaluation.evaluator import Evaluator
from maskrcnn_jax.inference.detect import make_detect
from maskrcnn_jax.inference.predictor import Predictor
from maskrcnn_jax.run_folder import save_options
from maskrcnn_jax.training.checkpoint import Checkpoints
from maskrcnn_jax.training.step import create_train_state
from maskrcnn_jax.weights.convert import to_torchvision
from maskrcnn_jax.weights.files import write_arrays
from maskrcnn_jax.weights.published import PUBLISHED
from tests.models.tiny import OPTIONS, tiny_model

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a dataset of 64-pixel shapes with the ids 7, 12 and 900, and a run whose network is random."""
    place = tmp_path_factory.mktemp("place")
    categories = {"circle": 7, "star": 12, "heart": 900}
    write_dataset(place / "own", num_train=1, num_val=3, image_size=64, categories=categories, splits=("train", "val"))
    config = mr.load_config("shapes")
    config.data.coco_dir = str(place / "own")
    config.data.eval_split = "val"
    config.data.short_side = config.data.long_side = 64
    config.eval_batch_size = 1
    config.model.update(OPTIONS)
    options = to_options(config)
    model = tiny_model(num_classes=4, **config.model)
    (place / "run").mkdir()
    save_options(options, place / "run")
    Categories.create([900, 7, 12], ["heart", "circle", "star"]).save(place / "run" / "categories.json")
    with contextlib.closing(Checkpoints(place / "run")) as checkpoints:
        checkpoints.save(create_train_state(model, optax.sgd(0.1), make_mesh(), options.optim)[1])
    write_arrays(place / "weights.safetensors", to_torchvision(model))
    return place


@pytest.fixture(scope="module")
def model(place):
    return mr.load(place / "run")


@pytest.fixture(scope="module")
def paths(place):
    return sorted((place / "own" / "val").iterdir())


def same(ours, theirs):
    assert ours.to_coco(1) == theirs.to_coco(1)


def test_a_pickled_model_predicts_the_same(model, place):
    image = next((place / "own" / "val").iterdir())
    copied = pickle.loads(pickle.dumps(model))
    assert copied.predict(image, min_score=0).to_coco(1) == model.predict(image, min_score=0).to_coco(1)


def test_many_shapes_of_images_are_told_once_if_each_is_compiled(model, caplog):
    data = dataclasses.replace(model.options.data, buckets="exact", long_side=256)
    exact = Predictor(model.network, model.categories, dataclasses.replace(model.options, data=data))
    for predictor, told in ((model, 0), (exact, 1)):
        caplog.clear()
        for width in range(32, 256, 16):
            predictor._prepare(np.zeros((64, width, 3), np.uint8))
        assert caplog.text.count("data.buckets is exact") == told


def test_importing_the_package_imports_nothing_else():
    """So that flags of JAX can be set after it; the names come when they are used."""
    code = """
import sys
import maskrcnn_jax as mr
assert not {"jax", "flax", "numpy", "cv2"} & set(sys.modules), "imported"
assert "load" in dir(mr) and not hasattr(mr, "lode")
from maskrcnn_jax import UserError
assert "jax" not in sys.modules
assert callable(mr.load) and callable(mr.ops.nms)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_what_is_found_has_boxes_names_ids_scores_and_masks_of_the_image(model, paths):
    found = model.predict(paths[0], min_score=0)
    assert len(found) > 3
    assert found.boxes.shape == (len(found), 4)
    assert (found.boxes >= 0).all() and (found.boxes <= 64).all()
    assert (np.diff(found.scores) <= 0).all()
    table = {1: (7, "circle"), 2: (12, "star"), 3: (900, "heart")}
    rows = zip(found.labels, found.category_ids, found.names, strict=True)
    assert all((category_id, name) == table[label] for label, category_id, name in rows)
    assert found.masks.shape == (len(found), 64, 64) and found.masks.dtype == bool
    assert found.masks.any()
    assert found.image.shape == (64, 64, 3)
    assert found.draw().shape == (512, 512, 3)
    assert not np.array_equal(found.draw(min_side=0), found.image)
    assert found.names[0] in repr(found)

    results = json.loads(json.dumps(found.to_coco(41)))
    assert [result["image_id"] for result in results] == [41] * len(found)
    assert [result["category_id"] for result in results] == found.category_ids.tolist()
    np.testing.assert_array_equal(
        [coco_mask.decode(result["segmentation"]) for result in results], found.masks.astype(np.uint8)
    )
    x, y, width, height = np.transpose([result["bbox"] for result in results])
    np.testing.assert_allclose(np.stack([x, y, x + width, y + height], axis=1), found.boxes, atol=1e-4)


def test_some_of_what_is_found_is_chosen_by_rows(model, paths):
    found = model.predict(paths[0], min_score=0)
    limit = float(found.scores[2])
    sure = found[found.scores >= limit]
    assert 0 < len(sure) < len(found)
    same(sure, model.predict(paths[0], min_score=limit))
    np.testing.assert_array_equal(sure.masks, found.masks[: len(sure)])
    assert [one.names for one in found] == [[name] for name in found.names]
    assert found[-1].scores == found.scores[-1]
    assert len(found[:0]) == 0 and found[:0].masks.shape == (0, 64, 64)
    with pytest.raises(IndexError):
        found[len(found)]


def test_arrays_paths_and_lists_of_them_give_the_same(model, paths):
    image = cv2.cvtColor(cv2.imread(str(paths[1])), cv2.COLOR_BGR2RGB)
    several = model.predict([image, str(paths[1]), paths[0]], min_score=0)
    assert isinstance(several, list) and len(several) == 3
    same(several[0], several[1])
    same(several[0], model.predict(image, min_score=0))
    same(several[2], model.predict(paths[0], min_score=0))
    assert several[2].to_coco(1) != several[0].to_coco(1)
    assert model.predict([]) == []


def test_predictions_are_those_that_evaluations_measure(model, paths):
    evaluated = Evaluator(model.options, model.categories)(model.network).results
    predicted = [
        result
        for image_id, path in enumerate(paths, start=1)
        for result in model.predict(path, min_score=0).to_coco(image_id)
    ]
    assert len(predicted) > 10
    assert predicted == evaluated


def test_the_limit_of_a_run_is_not_that_of_another_split(model, caplog):
    limited = evaluation_options(model.options, limit=2)
    assert evaluation_options(limited).data.eval_limit == 2
    for named in ({"split": "train"}, {"coco_dir": "other"}, {"tfds_dir": "other"}):
        assert evaluation_options(limited, **named).data.eval_limit == 0
        assert evaluation_options(limited, **named, limit=1).data.eval_limit == 1
    with caplog.at_level(logging.INFO, "maskrcnn_jax"):
        Evaluator(limited, model.categories)
    assert "evaluating 2 of the 3 images of val" in caplog.messages


def test_the_devices_share_a_batch_of_any_size(model):
    """Else each would detect in all of its images."""
    sizes = []

    def detect(network):
        def run(images, sizes_):
            sizes.append(len(images))
            return made(images, sizes_)

        made = make_detect(network)
        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("maskrcnn_jax.evaluation.evaluator.make_detect", detect)
        Evaluator(model.options, model.categories)(model.network)
    assert sizes == [8], "1 image was asked for, and there are 8 devices"


def test_an_evaluation_may_ask_for_more_detections_than_the_model_was_trained_with(model):
    before = mr.evaluate(model)
    more = mr.evaluate(model, max_detections=120)
    numbers = [Counter(result["image_id"] for result in found.results) for found in (before, more)]
    assert max(numbers[0].values()) <= OPTIONS["box_detections_per_img"] < max(numbers[1].values())
    assert "bbox_AR120" in more.metrics and "bbox_AR120" not in before.metrics
    assert model.network.options.box_detections_per_img == OPTIONS["box_detections_per_img"]


def test_an_evaluation_with_several_views_has_the_metrics_without_them_too(model):
    plain = mr.evaluate(model).metrics
    evaluation = mr.evaluate(model, tta=("flip",))
    metrics = evaluation.metrics
    assert {name: metrics[f"without_tta_{name}"] for name in plain} == plain
    assert {result["image_id"] for result in evaluation.results} == {1, 2, 3}
    lines = format_table(metrics).splitlines()
    assert lines[-2].startswith("without test-time augmentation: box AP") and lines[-1].startswith("box AP")


def test_what_is_predicted_with_several_views_is_what_evaluations_measure(model, paths):
    results = mr.evaluate(model, tta="flip").results
    for image_id, path in enumerate(paths, start=1):
        found = model.predict(path, min_score=0, tta="flip").to_coco(image_id)
        assert found == [result for result in results if result["image_id"] == image_id]


def test_a_split_that_lists_fewer_categories_is_compared_by_the_labels_of_the_model(model, place, tmp_path):
    root = shutil.copytree(place / "own", tmp_path / "own")
    path = root / "annotations" / "instances_val.json"
    content = json.loads(path.read_text())
    content["annotations"] = [a for a in content["annotations"] if a["category_id"] != 7]
    content["categories"] = [category for category in content["categories"] if category["id"] != 7]
    path.write_text(json.dumps(content))
    evaluator = Evaluator(evaluation_options(model.options, coco_dir=root), model.categories)
    dataset = evaluator._split.dataset
    labels = dict(zip(model.categories.ids, model.categories.labels, strict=True))
    assert dataset.labels.tolist() == [labels[i] for i in dataset.category_ids.tolist()]
    assert dataset.categories == model.categories
    assert 7 not in evaluator.truth.cats


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((64, 64, 3)),
        np.zeros((64, 64), np.uint8),
        np.zeros((64, 64, 4), np.uint8),
        np.zeros((0, 3, 3), np.uint8),
    ],
    ids=["float", "grey", "rgba", "empty"],
)
def test_an_array_that_is_no_image_is_refused(model, image):
    with pytest.raises(UserError, match=r"is not an image for this model; give uint8 \(height, width, 3\)"):
        model.predict(image)


def test_a_file_that_is_no_image_is_refused(model, place):
    with pytest.raises(UserError, match=r"config\.json cannot be read as an image"):
        model.predict(place / "run" / "config.json")


def test_weights_of_a_run_give_the_same_with_its_config_and_categories(model, place, paths):
    expected = model.predict(paths[0], min_score=0)
    weights = place / "weights.safetensors"
    same(mr.load(weights, config=place / "run").predict(paths[0], min_score=0), expected)
    other = mr.load(weights, config=model.options, categories=place / "run" / "categories.json")
    same(other.predict(paths[0], min_score=0), expected)
    with pytest.raises(UserError, match="another number of classes"):
        mr.load(weights, config=model.options)  # COCO's categories, as nothing else was said


def test_a_checkpoint_is_chosen_by_its_step(model, place, paths):
    same(mr.load(place / "run", checkpoint=0).predict(paths[0]), model.predict(paths[0]))
    with pytest.raises(UserError, match="no checkpoint '7'"):
        mr.load(place / "run", checkpoint=7)
    for file in ("weights.safetensors", "model.onnx"):
        with pytest.raises(UserError, match="no checkpoints.*leave"):
            mr.load(file, checkpoint="best")


@pytest.mark.parametrize(("is_faster", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_bfloat16_is_used_where_it_is_faster(model, place, paths, monkeypatch, caplog, is_faster, dtype):
    monkeypatch.setattr("maskrcnn_jax.api.bfloat16_is_faster", lambda: is_faster)
    half = mr.load(place / "run", bf16=True)
    assert half.options.model.dtype == half.network.dtype.name == dtype
    assert ("computes in float32" in caplog.text) is not is_faster
    found, wanted = half.predict(paths[0], min_score=0), model.predict(paths[0], min_score=0)
    assert np.isfinite(found.boxes).all()
    np.testing.assert_allclose(found.scores[:5], wanted.scores[:5], atol=0.02)


def test_what_cannot_be_loaded_is_one_sentence(place):
    with pytest.raises(UserError, match="nowhere is neither the folder of a run, a file of weights nor"):
        mr.load(place / "nowhere")
    with pytest.raises(UserError, match="holds no trained model"):
        mr.load(place / "own")
    with pytest.raises(UserError, match="name of published weights; those are torchvision:maskrcnn_resnet50_fpn_v2, "):
        mr.load("maskrcnn_resnet50_fpn_v2")
    for config in ("shapes", None):
        with pytest.raises(UserError, match="no weights named torchvision:fcos"):
            mr.load("torchvision:fcos", config=config)
    with pytest.raises(UserError, match="torchvision:resnet50 need the config that they belong to"):
        mr.load("torchvision:resnet50")
    with pytest.raises(UserError, match="need the config that they belong to"):
        mr.load(place / "weights.safetensors")
    with pytest.raises(UserError, match="there is no config 'shape'; .*shapes"):
        mr.load(place / "weights.safetensors", config="shape")
    with pytest.raises(UserError, match="has its own"):
        mr.load(place / "run", categories=place / "run" / "categories.json")


def test_published_weights_have_their_configs():
    assert {name for name in PUBLISHED if "mask" in name} == {name for name in PUBLISHED if PUBLISHED[name].config}
    known = {name: find_options(PUBLISHED[name].config).model for name in PUBLISHED if PUBLISHED[name].config}
    assert known["torchvision:maskrcnn_resnet50_fpn_v2"].box_conv_channels == (256,) * 4
    assert known["torchvision:maskrcnn_resnet50_fpn"].norm == "frozen"
    assert known["detectron2:mask_rcnn_R_101_FPN_3x"].backbone == "resnet101"
    assert known["detectron2:mask_rcnn_R_50_FPN_1x"].exact_anchors
    assert find_options("paper:table=2,row=1").model.backbone == "resnet101"
