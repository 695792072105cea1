"""Recognises boxes and polygons in other formats than COCO's, by the numbers of a whole file.

COCO's boxes are x, y, width, height in pixels. Two corners, or fractions of the image, would be read without an error
and teach nonsense.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from maskrcnn_jax.data.coco import CocoDataset
from maskrcnn_jax.data.findings import Kind, Report

_ENOUGH = 3  # objects that must agree; fewer prove nothing
_ROUNDING = 1.01  # of shares, which may pass 1 a little


def correct_formats(dataset: CocoDataset, report: Report) -> CocoDataset:
    """Report boxes and polygons in other formats than COCO's.

    Args:
        dataset: as it was read, its boxes not clipped.
        report: called with every finding. If it returns, the numbers are converted.

    Returns:
        The dataset in COCO's formats.
    """
    limits = dataset.sizes[dataset.image_rows][:, ::-1].astype(np.float32)  # [K, 2] width, height

    details: dict[str, Any] = {"rows": np.sort(dataset.places), "path": dataset.annotation_path}
    if _are_shares(dataset.coordinates):
        report(Kind.NORMALISED_POLYGONS.finding(**details))
        dataset = replace(dataset, coordinates=_in_pixels(dataset, limits))
    if _are_shares(_as_given(dataset.boxes)):
        report(Kind.NORMALISED_BOXES.finding(**details))
        dataset = replace(dataset, boxes=dataset.boxes * np.tile(limits, 2))
    if _are_corners(dataset, limits):
        report(Kind.CORNERS.finding(**details))
        dataset = replace(dataset, boxes=_as_given(dataset.boxes))
    return dataset


def polygon_bounds(
    coordinates: np.ndarray, part_offsets: np.ndarray, first_part: np.ndarray, num_parts: np.ndarray
) -> np.ndarray:
    """Compute the boxes around the polygons of K objects.

    Args:
        coordinates, part_offsets, first_part, num_parts: as in CocoDataset.

    Returns:
        [K, 4] float64 x1, y1, x2, y2; NaN for objects without polygons.
    """
    bounds = np.full((len(num_parts), 4), np.nan)
    rows = np.flatnonzero(num_parts > 0)
    if not len(rows):
        return bounds
    begins = part_offsets[first_part[rows]] // 2  # in points
    ends = part_offsets[first_part[rows] + num_parts[rows]] // 2
    order = np.argsort(begins)
    # Every second result is that of the points between two objects. The last end may be that of the array, which
    # reduceat takes for granted.
    cuts = np.stack([begins[order], ends[order]], axis=1).ravel()
    cuts = cuts[:-1] if cuts[-1] * 2 == len(coordinates) else cuts
    for column, values in enumerate((coordinates[::2], coordinates[1::2])):
        bounds[rows[order], column] = np.minimum.reduceat(values, cuts)[::2]
        bounds[rows[order], column + 2] = np.maximum.reduceat(values, cuts)[::2]
    return bounds


def overlaps(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Compute the intersection over union of boxes [K, 4] x1, y1, x2, y2, row by row.

    Returns:
        [K], 0 for boxes without area, NaN where a box is NaN.
    """
    boxes, others = boxes.astype(np.float64), others.astype(np.float64)  # areas of wild numbers overflow float32
    sides = np.minimum(boxes[:, 2:], others[:, 2:]) - np.maximum(boxes[:, :2], others[:, :2])
    shared = np.maximum(sides, 0).prod(axis=1)
    areas = [np.maximum(b[:, 2:] - b[:, :2], 0).prod(axis=1) for b in (boxes, others)]
    return shared / np.maximum(areas[0] + areas[1] - shared, 1e-9)


def _as_given(boxes: np.ndarray) -> np.ndarray:
    """Return boxes [K, 4] as the numbers of the file: x, y, width, height, unless the file means something else."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)


def _are_shares(numbers: np.ndarray) -> bool:
    """Whether all numbers lie in 0..1, and not only because they are the corners of a few pixels."""
    if not numbers.size or numbers.min() < 1 - _ROUNDING or numbers.max() > _ROUNDING:
        return False
    return bool(np.mean(numbers % 1 != 0) > 0.5)


def _in_pixels(dataset: CocoDataset, limits: np.ndarray) -> np.ndarray:
    rows = np.flatnonzero(dataset.num_parts > 0)
    lengths = np.diff(dataset.part_offsets)
    width_height = np.ones((len(lengths), 2))  # of the image, for each polygon
    for row in rows.tolist():
        first = dataset.first_part[row]
        width_height[first : first + dataset.num_parts[row]] = limits[row]
    return dataset.coordinates * np.repeat(width_height, lengths // 2, axis=0).ravel()


def _are_corners(dataset: CocoDataset, limits: np.ndarray) -> bool:
    given = _as_given(dataset.boxes)
    first, second = given[:, :2], given[:, 2:]
    as_corners = (second > first).all(axis=1) & (second <= limits + 1).all(axis=1)
    if len(given) < _ENOUGH or as_corners.mean() < 0.99:
        return False
    bounds = polygon_bounds(dataset.coordinates, dataset.part_offsets, dataset.first_part, dataset.num_parts)
    known = ~np.isnan(bounds[:, 0])
    if known.sum() >= _ENOUGH:
        corners = overlaps(given[known], bounds[known])
        sizes = overlaps(dataset.boxes[known], bounds[known])
        return bool(np.median(corners) > 0.8 and np.mean(corners > sizes) > 0.9)
    # Without outlines: boxes that as sizes pass the border by more than anybody's rounding does.
    beyond = (dataset.boxes[:, 2:] > 1.05 * limits + 1).any(axis=1)
    return bool(beyond.sum() >= _ENOUGH and beyond.mean() > 0.2)
