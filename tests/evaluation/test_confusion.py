"""What detections are, judged by hand."""

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from maskrcnn_jax.evaluation.confusion import Kind, Match, match


def entry(category, box, **more):
    """An object or a detection."""
    return {"category_id": category, "bbox": box, "score": 1.0} | more


def masked(category, box, rows):
    """One whose mask is some rows of an image of 20x20 pixels."""
    mask = np.zeros((20, 20), np.uint8, order="F")
    mask[rows, :10] = 1
    return entry(category, box, segmentation=coco_mask.encode(mask))


OBJECTS = [entry(7, [0, 0, 10, 10]), entry(9, [50, 50, 20, 20])]


@pytest.mark.parametrize(
    "detection, kind, place",
    [
        (entry(7, [0, 0, 10, 9]), Kind.CORRECT, 0),
        (entry(7, [50, 50, 20, 18]), Kind.WRONG_CLASS, 1),
        (entry(7, [0, 0, 10, 4]), Kind.POOR_BOX, 0),
        (entry(9, [0, 0, 10, 4]), Kind.BACKGROUND, None),
        (entry(7, [0, 0, 2, 4]), Kind.BACKGROUND, None),
        (entry(7, [30, 30, 10, 10]), Kind.BACKGROUND, None),
    ],
)
def test_a_detection_is_judged_by_the_object_that_it_overlaps(detection, kind, place):
    assert match(OBJECTS, [detection]) == [Match(kind, place)]


def test_a_second_detection_of_an_object_is_a_duplicate_whatever_its_class():
    found = [entry(9, [50, 50, 20, 20]), entry(9, [50, 50, 20, 18]), entry(7, [50, 50, 20, 18])]
    assert match(OBJECTS, found) == [Match(Kind.CORRECT, 1), Match(Kind.DUPLICATE, 1), Match(Kind.DUPLICATE, 1)]


def test_the_surest_detection_gets_the_object_that_it_overlaps_most():
    objects = [entry(7, [0, 0, 10, 10]), entry(9, [0, 0, 10, 8])]
    found = [entry(7, [0, 0, 10, 10]), entry(9, [0, 0, 10, 10])]
    assert match(objects, found) == [Match(Kind.CORRECT, 0), Match(Kind.CORRECT, 1)]


def test_a_mask_that_overlaps_too_little_is_a_poor_mask():
    (known,) = objects = [masked(7, [0, 0, 10, 10], slice(0, 10))]
    assert match(objects, [known]) == [Match(Kind.CORRECT, 0)]
    assert match(objects, [masked(7, [0, 0, 10, 10], slice(6, 10))]) == [Match(Kind.POOR_MASK, 0)]
    assert match(objects, [masked(9, [0, 0, 10, 10], slice(6, 10))]) == [Match(Kind.WRONG_CLASS, 0)]
    del known["segmentation"]
    assert match(objects, [masked(7, [0, 0, 10, 10], slice(6, 10))]) == [Match(Kind.CORRECT, 0)], "no mask is known"


def test_crowds_and_what_lies_in_them_count_for_nothing():
    crowd = [entry(7, [0, 0, 60, 60], iscrowd=1)]
    found = [entry(7, [5, 5, 10, 10]), entry(7, [80, 80, 10, 10]), entry(7, [55, 55, 10, 10])]
    assert match(crowd, found) == [Match(Kind.IGNORED, None), *[Match(Kind.BACKGROUND, None)] * 2]


def test_what_is_surer_decides_alone():
    rng = np.random.default_rng(0)
    boxes = rng.uniform(0, 30, (30, 4)) + [0, 0, 5, 5]
    entries = [entry(int(category), box.tolist()) for category, box in zip(rng.integers(1, 3, 30), boxes, strict=True)]
    objects, found = entries[:10], entries[10:]
    assert len({kind for kind, _ in match(objects, found)}) >= 4
    for number in range(20):
        assert match(objects, found[:number]) == match(objects, found)[:number]


def test_nothing_matches_nothing():
    assert match([], []) == [] and match(OBJECTS, []) == []
    assert match([], [entry(7, [0, 0, 5, 5])]) == [Match(Kind.BACKGROUND, None)]
