"""Finds areas that cannot be right.

COCO's evaluation sorts objects into small, medium and large by the ``area`` in the file. Some tools write -1, 0 or the
share of the image, which changes APs, APm and APl. Negative, infinite or NaN areas change even AP.
"""

from dataclasses import replace

import numpy as np
from pycocotools import mask as coco_mask

from maskrcnn_jax.data.coco import CocoDataset
from maskrcnn_jax.data.findings import Kind

_TOO_SMALL = 0.01  # of the mask; inexact areas are kept, because COCO's own differ a little from its masks


def drop_impossible_areas(dataset: CocoDataset) -> CocoDataset:
    """Replace areas that cannot be right by NaN; evaluation then takes the mask's, or the box's where there is none.

    Impossible are areas that are not positive, not finite, larger than the box and the mask allow, or below a
    hundredth of the mask. Without a mask, at most a pixel and below a hundredth of the box: a share of the image.
    """
    areas, sides = dataset.areas, _sides(dataset.boxes)
    wrong = ~np.isnan(areas) & ~((areas > 0) & np.isfinite(areas))
    with np.errstate(over="ignore", invalid="ignore"):  # sides may be infinite
        # The mask fills a part of the box, so this is a first sieve.
        too_small = areas < _TOO_SMALL * sides.prod(axis=1)
        too_large = areas > _most(sides)
    suspects = np.flatnonzero((too_small | too_large) & ~wrong)
    for row, image_row in zip(suspects.tolist(), dataset.image_rows[suspects].tolist(), strict=True):
        if dataset.num_parts[row] < 0:
            wrong[row] = too_large[row] or areas[row] <= 1
        else:
            area, of_mask = _measure_mask(dataset, row, image_row)
            wrong[row] = areas[row] < _TOO_SMALL * area or areas[row] > max(_most(sides[row]), _most(of_mask))
    if not wrong.any():
        return dataset
    places = {Kind.WRONG_AREA: np.sort(dataset.places[wrong])}
    return replace(dataset, areas=np.where(wrong, np.nan, areas), problem_places=dataset.problem_places | places)


def _sides(boxes: np.ndarray) -> np.ndarray:
    return np.maximum(boxes[..., 2:] - boxes[..., :2], 0).astype(np.float64)


def _most(sides: np.ndarray) -> np.ndarray:
    """Return the most pixels that a mask in boxes with these sides [..., 2] has."""
    return (sides + 1).prod(axis=-1)  # a pixel that is touched on both sides counts whole


def _measure_mask(dataset: CocoDataset, row: int, image_row: int) -> tuple[float, np.ndarray]:
    """Return the area of a mask, and the width and height of the box around it."""
    first, num = dataset.first_part[row], dataset.num_parts[row]
    if num == 0:
        rle = dataset.rle(row, *dataset.sizes[image_row].tolist())
        return float(coco_mask.area(rle)), coco_mask.toBbox(rle)[2:]
    bounds = dataset.part_offsets[first : first + num + 1]
    points = dataset.coordinates[bounds[0] : bounds[-1]].reshape(-1, 2)
    parts = np.split(points, (bounds[1:-1] - bounds[0]) // 2)
    return sum(map(_polygon_area, parts)), np.ptp(points, axis=0)


def _polygon_area(points: np.ndarray) -> float:
    x, y = (points - points[0]).T  # large coordinates would cancel
    return abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2
