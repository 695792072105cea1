"""Detections of several passes over an image, by values computed by hand."""

import numpy as np
import pytest

from maskrcnn_jax.inference.merging import distinct

# IoU 0.6 of the first two and 1 of the first and the last.
BOXES = np.float32([[0, 0, 10, 10], [0, 0, 10, 6], [0, 0, 10, 10]])
LABELS = np.array([1, 1, 2])


@pytest.mark.parametrize(
    ("source", "threshold", "class_agnostic", "kept"),
    [
        ([0, 1, 1], 0.5, False, [0, 2]),
        ([0, 1, 1], 0.7, False, [0, 1, 2]),
        ([0, 0, 1], 0.5, False, [0, 1, 2]),  # neighbours that one pass keeps apart
        ([-1, -1, 1], 0.5, False, [0, 2]),
        ([0, 1, 1], 0.7, True, [0, 1]),
        ([0, 1, 1], 0.5, True, [0]),
    ],
)
def test_the_better_of_two_detections_of_different_passes_stays(source, threshold, class_agnostic, kept):
    source, order = np.array(source), np.arange(3)
    rows = distinct(BOXES, LABELS, source, order, iou_threshold=threshold, class_agnostic=class_agnostic)
    assert rows.tolist() == kept


def test_the_order_decides_and_rows_that_it_leaves_out_do_not_take_part():
    rows = distinct(BOXES, LABELS, np.array([0, 1, 1]), np.array([1, 0]), iou_threshold=0.5, class_agnostic=False)
    assert rows.tolist() == [1]
