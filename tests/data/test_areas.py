"""Areas that cannot be right are recomputed and told of; all others reach the evaluation bit for bit."""

import math

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from maskrcnn_jax.data.dataset import load_coco
from maskrcnn_jax.data.findings import Kind
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.evaluation.coco_metrics import evaluate, ground_truth, load_annotations

SQUARE = [10, 10, 50, 10, 50, 50, 10, 50]  # 1600 pixels
LINE = [10, 10, 90, 89, 90, 90, 10, 11]  # 80 pixels in a box of 6400
OUTLINES = {
    "polygon": [SQUARE],
    "polygons": [SQUARE, [60, 60, 90, 60, 90, 90]],
    "line": [LINE],
    "counts": coco_mask.frPyObjects([SQUARE], 100, 120)[0],
    "none": None,
}
OUTLINES["counts"] = OUTLINES["counts"] | {"counts": OUTLINES["counts"]["counts"].decode()}
BOXES = {"polygons": [10, 10, 80, 80], "line": [10, 10, 80, 80]}
AREAS = {"polygon": 1600, "polygons": 1600 + 450, "line": 80, "counts": 1600, "none": 1600}


def area_of(dataset, outline, area):
    """Return the area that an evaluation uses, in the ground truth of a dataset and of a file, and the problems."""
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": BOXES.get(outline, [10, 10, 40, 40])}
    annotation |= {"segmentation": OUTLINES[outline], "area": area}
    index = load_coco(dataset.write([(100, 120)], [annotation]), "train2017", keep_flat=True)
    (truth,) = ground_truth(index).anns.values()
    assert load_annotations(dataset.json_path).anns[1]["area"] == truth["area"]
    return truth["area"], index.problems.get(Kind.WRONG_AREA, 0)


IMPOSSIBLE = [-1, 0, -0.0, 1e-300, math.inf, -math.inf, math.nan, 0.13, 1.0, 1e6, 10**400, "n/a", "", "nan", [5], {}]


@pytest.mark.parametrize("outline", OUTLINES)
@pytest.mark.parametrize("area", IMPOSSIBLE, ids=str)
def test_an_area_that_cannot_be_right_is_replaced_by_that_of_the_mask_or_box(dataset, outline, area):
    if outline == "line" and area == 1.0:
        return  # more than a hundredth of its mask
    found, problems = area_of(dataset, outline, area)
    assert found == pytest.approx(AREAS[outline], rel=0.15 if outline == "line" else 0.05)
    assert problems == 1


@pytest.mark.parametrize("outline", OUTLINES)
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9999, 1.0])
def test_an_area_that_is_merely_inexact_stays_as_it_is_to_the_last_bit(dataset, outline, share):
    area = AREAS[outline] * share + 1e-9
    assert area_of(dataset, outline, area) == (area, 0)


def test_an_area_as_text_is_that_number_and_without_one_it_is_the_masks_without_a_word(dataset):
    assert area_of(dataset, "polygon", "1234.5") == (1234.5, 0)
    assert area_of(dataset, "polygon", None) == (pytest.approx(1600, rel=0.05), 0)


def test_objects_too_thin_or_in_a_wrong_box_keep_the_area_that_fits_their_mask(dataset):
    assert area_of(dataset, "line", 60.0) == (60.0, 0)
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 10, 4, 4], "segmentation": [SQUARE]}
    index = load_coco(dataset.write([(100, 120)], [annotation | {"area": 1600.5}]), "train2017")
    assert index.areas.tolist() == [1600.5]


def test_a_box_whose_far_corner_overflows_has_no_area(dataset):
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 3e38, 0, 3e38], "area": 20}
    path = dataset.write([(100, 120)], [annotation | {"segmentation": [[0, 0, 0, 0, 0, 0]]}])
    with pytest.raises(UserError, match="1 boxes without area"):
        load_coco(path, "train2017")


def test_the_areas_of_coco_are_all_kept(coco_dir):
    for split in ("train2017", "val2017"):
        index = load_coco(coco_dir, split, keep_flat=True)
        assert Kind.WRONG_AREA not in index.problems
        assert not np.isnan(index.areas).any()


@pytest.mark.parametrize("wrong", [-1, 0, math.inf, math.nan, lambda area: area / (100 * 120), str])
def test_the_metrics_by_size_are_those_of_correct_areas(dataset, wrong):
    boxes = [[5, 5, 10, 10], [20, 20, 60, 40]]
    outlines = [[x, y, x + w, y, x + w, y + h, x, y + h] for x, y, w, h in boxes]
    right = [
        {"id": i, "image_id": 1, "category_id": 1, "bbox": box, "segmentation": [outline], "area": box[2] * box[3]}
        for i, (box, outline) in enumerate(zip(boxes, outlines, strict=True), 1)
    ]
    dataset.write([(100, 120)], right)
    found = [a | {"score": 0.9} for a in load_annotations(dataset.json_path).anns.values()][:1]
    expected = evaluate(dataset.json_path, found)
    assert (expected["bbox_APs"], expected["bbox_APm"]) == (pytest.approx(1), 0)
    dataset.write([(100, 120)], [a | {"area": wrong(a["area"]) if callable(wrong) else wrong} for a in right])
    assert evaluate(dataset.json_path, found) == expected
