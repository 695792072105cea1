"""Errors counted by hand."""

import pytest

from maskrcnn_jax.evaluation.coco_metrics import load_annotations
from maskrcnn_jax.evaluation.confusion import ImageErrors, confusion
from maskrcnn_jax.writing import write_json


def objects(*rows, crowd=()):
    return [
        {"id": i + 1, "image_id": image, "category_id": category, "bbox": box, "area": box[2] * box[3]}
        | {"iscrowd": int(i in crowd), "segmentation": [[0, 0, 1, 0, 1, 1]]}
        for i, (image, category, box) in enumerate(rows)
    ]


@pytest.fixture
def truth_of(tmp_path):
    def truth_of(annotations):
        images = [{"id": i, "file_name": f"{i}.jpg", "width": 100, "height": 100} for i in (1, 2, 3)]
        categories = [{"id": 7, "name": "cat"}, {"id": 9, "name": "dog"}]
        document = {"images": images, "categories": categories, "annotations": annotations}
        write_json(tmp_path / "truth.json", document)
        return load_annotations(tmp_path / "truth.json")

    return truth_of


def found(image, category, score, box):
    return {"image_id": image, "category_id": category, "score": score, "bbox": box}


def test_pairs_and_errors_are_those_counted_by_hand(truth_of):
    truth = truth_of(objects((1, 7, [0, 0, 10, 10]), (1, 9, [50, 50, 20, 20]), (2, 7, [0, 0, 10, 10])))
    results = [
        found(1, 7, 0.9, [0, 0, 10, 10]),  # right
        found(1, 7, 0.8, [50, 50, 20, 18]),  # a dog that was taken for a cat
        found(1, 7, 0.7, [0, 0, 10, 9]),  # a second detection of what has been found
        found(2, 7, 0.4, [0, 0, 10, 10]),  # too unsure
    ]
    pairs, images = confusion(truth, results)
    assert pairs == {(7, 7): 1, (9, 7): 1, (None, 7): 1, (7, None): 1}
    assert images[1] == ImageErrors(right=1, confused=1, missed=0, invented=1)
    assert images[2] == ImageErrors(right=0, confused=0, missed=1, invented=0)
    assert (images[1].share_right, images[2].share_right, images[3].share_right) == (1 / 3, 0, 1)


def test_the_surest_detection_gets_the_object_that_it_overlaps_most(truth_of):
    truth = truth_of(objects((1, 7, [0, 0, 10, 10]), (1, 9, [0, 0, 10, 8])))
    pairs, _ = confusion(truth, [found(1, 9, 0.6, [0, 0, 10, 10]), found(1, 7, 0.9, [0, 0, 10, 10])])
    assert pairs == {(7, 7): 1, (9, 9): 1}


def test_crowds_and_what_lies_in_them_count_for_nothing(truth_of):
    truth = truth_of(objects((1, 7, [0, 0, 60, 60]), crowd=[0]))
    pairs, images = confusion(truth, [found(1, 7, 0.9, [5, 5, 10, 10]), found(1, 7, 0.9, [80, 80, 10, 10])])
    assert pairs == {(None, 7): 1}
    assert images[1] == ImageErrors(right=0, confused=0, missed=0, invented=1)
