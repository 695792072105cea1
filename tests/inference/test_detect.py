"""Every image is detected once, in the pixels of its file, whatever pads the batch."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from pycocotools import mask as coco_mask

from maskrcnn_jax.errors import UserError
from maskrcnn_jax.evaluation.coco_metrics import evaluate
from maskrcnn_jax.inference import detect as inference
from maskrcnn_jax.inference.detect import detect_ahead, make_detect, run_detection, with_options
from maskrcnn_jax.structures import Batch, Detections
from tests.inference.detections import make_detections
from tests.models.tiny import tiny_model, tiny_options


def make_batch(sizes, original_sizes, image_index, valid, padded=(64, 64)):
    """The upper left pixel of each image holds its index, for a fake detect to know it by."""
    images = np.zeros((len(sizes), *padded, 3), np.uint8)
    images[:, 0, 0, 0] = np.maximum(image_index, 0)
    arrays = (np.array(array, np.int32) for array in (sizes, original_sizes, image_index))
    return Batch(images, *arrays, np.array(valid, bool), None)


def fake_detect(images, sizes):
    """One detection an image, whose score tells which image it was made for; padding rows get one as well."""
    return make_detections([[([4, 4, 20, 20], (index + 1) / 256, 1)] for index in images[:, 0, 0, 0]])


def run(batches, num_images, image_ids=None, workers=0):
    image_ids = np.arange(100, 100 + num_images) if image_ids is None else image_ids
    options = {"category_ids": {1: 1}, "num_images": num_images, "workers": workers}
    return run_detection(fake_detect, batches, image_ids=image_ids, **options)


def test_every_image_is_counted_once_and_padding_rows_not_at_all():
    size = [[32, 32]] * 2
    batches = [
        make_batch(size, size, [3, 0], [True, True]),
        make_batch(size, size, [-1, 1], [False, True]),
        make_batch(size, size, [-1, -1], [False, False]),
        make_batch(size, size, [2, 0], [True, False]),
    ]
    results = run(batches, 4, np.array([2**40, 7, 8, 9]))
    found = [(result["image_id"], round(result["score"] * 256) - 1) for result in results]
    assert found == [(9, 3), (2**40, 0), (7, 1), (8, 2)]


def test_padding_rows_change_no_result():
    size = [[32, 32]]
    plain = run([make_batch(size, size, [0], [True])], 1)
    padded = run([make_batch(size * 3, size + [[1, 1], [0, 0]], [0, -1, -1], [True, False, False])], 1)
    assert padded == plain


@pytest.mark.slow
def test_several_processes_give_the_same_results_in_the_same_order():
    size = [[32, 32]] * 2
    batches = [make_batch(size, size, [2 * i, 2 * i + 1], [True, True]) for i in range(15)]
    assert run(batches, 30, workers=2) == run(batches, 30)


def exit_at_once(**arguments):
    os._exit(1)


@pytest.mark.slow
def test_a_process_that_dies_is_an_error_that_says_what_to_do(monkeypatch):
    monkeypatch.setattr(inference, "to_coco_results", exit_at_once)
    size = [[32, 32]]
    with pytest.raises(UserError, match="died.*eval_workers"):
        run([make_batch(size, size, [0], [True])], 1, workers=1)


def test_an_image_that_comes_twice_is_an_error():
    size = [[32, 32]]
    batch = make_batch(size, size, [0], [True])
    with pytest.raises(ValueError, match="image 100 came twice"):
        run([batch, batch], 1)


def test_missing_images_are_reported(caplog):
    size = [[32, 32]]
    with caplog.at_level("WARNING"):
        run([make_batch(size, size, [0], [True])], 3)
    assert "1 of 3 images" in caplog.text


def test_no_batches_and_images_without_objects_give_no_results():
    assert run([], 0) == []
    size = [[32, 32]] * 2
    batch = make_batch(size, size, [0, 1], [True, True])
    empty = run_detection(
        lambda images, sizes: make_detections([[], []]),
        [batch],
        image_ids=np.array([1, 2]),
        category_ids={1: 1},
        num_images=2,
    )
    assert empty == []


def test_the_next_batch_is_started_before_the_last_is_handed_out():
    log = []

    def detect(images, sizes):
        log.append("start")
        return make_detections([[]])

    batches = [make_batch([[32, 32]], [[32, 32]], [0], [True])] * 3
    for _ in detect_ahead(detect, zip(batches, strict=True)):
        log.append("host")
    assert log == ["start", "start", "host", "start", "host", "host"]


TRACES = []


class TinyModel(nnx.Module):
    """Its detections depend on a parameter and on the mode; TRACES holds the shapes that were compiled."""

    def __init__(self):
        self.scale = nnx.Param(jnp.float32(0.5))
        self.dropout = nnx.Dropout(0.9, rngs=nnx.Rngs(0))

    def detect(self, images, sizes):
        TRACES.append(images.shape)
        batch = images.shape[0]
        scores = self.dropout(jnp.full((batch, 3), self.scale[...]))
        boxes = jnp.tile(sizes[:, None, [1, 0, 1, 0]].astype(jnp.float32), (1, 3, 1))
        full = jnp.ones((batch, 3), bool)
        return Detections(boxes, scores, full.astype(jnp.int32), jnp.ones((batch, 3, 28, 28)), full)


def test_a_model_is_compiled_once_a_shape_and_runs_in_evaluation_mode():
    TRACES.clear()
    detect = make_detect(TinyModel())
    sizes = np.array([[30, 20], [10, 12]], np.int32)
    for shape in ((32, 32), (32, 64), (32, 32), (32, 64)):
        detections = jax.device_get(detect(np.zeros((2, *shape, 3), np.uint8), sizes))
        np.testing.assert_array_equal(detections.scores, np.full((2, 3), 0.5, np.float32))
        np.testing.assert_array_equal(detections.boxes[1, 0], [12, 10, 12, 10])
    assert TRACES == [(2, 32, 32, 3), (2, 32, 64, 3)]


def test_evaluating_again_after_training_compiles_nothing_and_sees_the_new_parameters():
    TRACES.clear()
    model, images, sizes = TinyModel(), np.zeros((1, 48, 48, 3), np.uint8), np.array([[30, 20]], np.int32)
    make_detect(model)(images, sizes)
    model.train()
    model.scale[...] = jnp.float32(0.25)
    scores = make_detect(model)(images, sizes).scores
    np.testing.assert_array_equal(scores, np.full((1, 3), 0.25, np.float32))
    assert len(TRACES) == 1


def make_oracle(objects, sizes_of):
    """Returns a detect that answers with the ground truth, ellipses that fill their boxes, at network-input size."""
    y, x = np.mgrid[0:28, 0:28]
    ellipse = (((x - 13.5) ** 2 + (y - 13.5) ** 2) <= 14**2).astype(np.float32)

    def detect(images, sizes):
        per_image = []
        for index, (height, width) in zip(images[:, 0, 0, 0], sizes, strict=True):
            original = sizes_of[index]
            ratio = np.array([width / original[1], height / original[0]] * 2)
            per_image.append([(np.array(box) * ratio, 0.9, label) for box, label in objects[index]])
        detections = make_detections(per_image)
        return detections._replace(masks=np.broadcast_to(ellipse, detections.masks.shape))

    return detect


def draw_ellipse(box, size):
    y, x = np.mgrid[0 : size[0], 0 : size[1]] + 0.5
    x1, y1, x2, y2 = box
    inside = ((x - (x1 + x2) / 2) / ((x2 - x1) / 2)) ** 2 + ((y - (y1 + y2) / 2) / ((y2 - y1) / 2)) ** 2 <= 1
    rle = coco_mask.encode(np.asfortranarray(inside.astype(np.uint8)))
    return {"size": list(size), "counts": rle["counts"].decode()}


def test_an_oracle_scores_one_through_resizing_padding_pasting_and_evaluation(tmp_path):
    sizes_of = [(300, 400), (480, 240), (200, 200), (333, 501)]
    objects = [
        [((20, 30, 220, 280), 1), ((210, 5, 395, 140), 2)],
        [((0, 0, 240, 300), 2)],
        [],
        [((100, 40, 480, 320), 2), ((3, 3, 95, 330), 1)],
    ]
    image_ids, category_ids = np.array([2**40, 11, 12, 13]), {1: 5, 2: 9}
    entries = []
    for index, image_objects in enumerate(objects):
        for box, label in image_objects:
            x1, y1, x2, y2 = box
            entry = {"id": len(entries) + 1, "image_id": int(image_ids[index]), "category_id": category_ids[label]}
            entry |= {"bbox": [x1, y1, x2 - x1, y2 - y1], "segmentation": draw_ellipse(box, sizes_of[index])}
            entries.append(entry)
    images = [
        {"id": int(image_id), "height": size[0], "width": size[1], "file_name": f"{image_id}.jpg"}
        for image_id, size in zip(image_ids, sizes_of, strict=True)
    ]
    categories = [{"id": 5, "name": "a"}, {"id": 9, "name": "b"}]
    path = tmp_path / "gt.json"
    path.write_text(json.dumps({"images": images, "annotations": entries, "categories": categories}))

    def resized(index):
        height, width = sizes_of[index]
        scale = 133 / min(height, width)
        return [int(height * scale), int(width * scale)]

    rows = [[3, 0], [1, -1], [2, -1]]
    batches = [
        make_batch(
            [resized(i) if i >= 0 else [1, 1] for i in pair],
            [sizes_of[i] if i >= 0 else [1, 1] for i in pair],
            pair,
            [i >= 0 for i in pair],
        )
        for pair in rows
    ]
    oracle = make_oracle(objects, sizes_of)
    results = run_detection(oracle, batches, image_ids=image_ids, category_ids=category_ids, num_images=4)
    metrics = evaluate(path, results)
    assert len(results) == 5
    assert metrics["bbox_AP"] == pytest.approx(1.0)
    # A 28 x 28 mask cannot follow an ellipse to the pixel, but overlaps it by more than 0.95.
    assert metrics["segm_AP"] == pytest.approx(1.0)


@pytest.mark.slow
def test_devices_that_share_a_batch_suppress_by_the_options_of_the_network():
    model = tiny_model(box_nms_method="gaussian", box_nms_class_agnostic=True, box_nms_sigma=0.3)
    images = np.random.default_rng(0).integers(0, 256, (jax.device_count(), 64, 64, 3)).astype(np.uint8)
    sizes = np.full((len(images), 2), 64, np.int32)
    detect, hard = make_detect(model), make_detect(with_options(model, tiny_options()))
    together, differ = jax.device_get(detect(images, sizes)), jax.device_get(hard(images, sizes))
    assert not np.array_equal(together.scores, differ.scores)
    for row in range(len(images)):
        alone = jax.device_get(detect(images[row : row + 1], sizes[row : row + 1]))
        for ours, theirs in zip(together, alone, strict=True):
            np.testing.assert_allclose(ours[row], theirs[0], rtol=1e-4, atol=1e-4)
