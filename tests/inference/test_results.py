"""Detections in the pixels of the image file, as COCO wants them."""

import json
import subprocess
import sys

import numpy as np
from pycocotools import mask as coco_mask

from maskrcnn_jax.inference.results import Instances, to_coco_results, unpad
from tests.inference.detections import MAX_DETECTIONS, make_detections


def test_boxes_are_scaled_per_axis_and_cut_at_the_image():
    detections = make_detections([[([10, 10, 20, 40], 0.9, 3), ([0, 0, 50, 40.2], 0.8, 1)], []])
    first, second = unpad(detections, np.array([[40, 50], [40, 50]]), np.array([[80, 200], [40, 50]]))
    np.testing.assert_array_equal(first.boxes, np.float32([[40, 20, 80, 80], [0, 0, 200, 80]]))
    np.testing.assert_array_equal(first.scores, np.float32([0.9, 0.8]))
    assert first.labels.tolist() == [3, 1]
    assert first.masks.shape == (2, 28, 28)
    assert [len(rows) for rows in second] == [0, 0, 0, 0]


def test_boxes_survive_resizing_and_scaling_back():
    rng = np.random.default_rng(0)
    corners = np.sort(rng.uniform(0, 1, (MAX_DETECTIONS, 2, 2)), 1).reshape(MAX_DETECTIONS, 4)
    original, resized = np.array([427, 640]), np.array([800, 1199])
    boxes = (corners * np.tile(original[::-1], 2)).astype(np.float32)
    at_input = boxes * np.tile((resized / original)[::-1], 2).astype(np.float32)
    detections = make_detections([[(box, 0.9, 1) for box in at_input]])
    # Two roundings of float32 at 1200 pixels.
    np.testing.assert_allclose(unpad(detections, resized[None], original[None])[0].boxes, boxes, rtol=0, atol=2e-4)


def test_a_result_holds_what_coco_wants_as_plain_numbers():
    instances = Instances(
        np.float32([[2, 3, 10, 23]]), np.float32([0.7]), np.int32([2]), np.ones((1, 28, 28), np.float32)
    )
    (result,) = to_coco_results(instances, image_id=2**40, image_size=(30, 20), category_ids={2: 18})
    assert json.loads(json.dumps(result)) == result
    rle = result.pop("segmentation")
    assert result == {
        "image_id": 2**40,
        "category_id": 18,
        "bbox": [2.0, 3.0, 8.0, 20.0],
        "score": float(np.float32(0.7)),
    }
    assert rle["size"] == [30, 20]
    assert 100 < coco_mask.area(rle) < 300


def test_labels_that_stand_for_no_category_are_left_out():
    instances = Instances(np.ones((2, 4), np.float32), np.ones(2), np.int32([12, 13]), np.ones((2, 28, 28)))
    results = to_coco_results(instances, image_id=1, image_size=(30, 20), category_ids={13: 13})
    assert [result["category_id"] for result in results] == [13]


def test_encoding_masks_does_without_jax():
    code = "import sys, maskrcnn_jax.inference.results; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
