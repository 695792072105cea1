"""Forms of boxes and polygons that annotation tools mistake for COCO's, told by the numbers of a whole file.

COCO's boxes are x, y, width, height in pixels. Two corners, or shares of the image, are read without an error and then
teach nonsense.
"""

from dataclasses import replace

import numpy as np

from maskrcnn_jax.data.annotation_file import AnnotationFile
from maskrcnn_jax.data.findings import Kind, Report

_ENOUGH = 3  # objects that must agree; fewer prove nothing
_ROUNDING = 1.01  # of shares, which may pass 1 a little


def correct_formats(file: AnnotationFile, report: Report) -> AnnotationFile:
    """Reports boxes and polygons that are not given as COCO wants them.

    Args:
        file: as it was read.
        report: called with what is wrong. If it returns, the numbers are converted.

    Returns:
        The file, with numbers as COCO wants them.
    """
    limits = file.sizes[file.image_rows][:, ::-1].astype(np.float32)  # [K, 2] width, height

    if _are_shares(file.coordinates):
        report(Kind.NORMALISED_POLYGONS.finding(file.places, path=file.path))
        file = replace(file, coordinates=_in_pixels(file, limits))
    if _are_shares(file.boxes):
        report(Kind.NORMALISED_BOXES.finding(file.places, path=file.path))
        file = replace(file, boxes=file.boxes * np.tile(limits, 2))
    if _are_corners(file, limits):
        report(Kind.CORNERS.finding(file.places, path=file.path))
        first, second = file.boxes[:, :2], file.boxes[:, 2:]
        with np.errstate(over="ignore"):
            file = replace(file, boxes=np.concatenate([first, second - first], axis=1))
    return file


def polygon_bounds(
    coordinates: np.ndarray, part_offsets: np.ndarray, first_part: np.ndarray, num_parts: np.ndarray
) -> np.ndarray:
    """Computes the boxes around the polygons of K objects.

    Args:
        coordinates, part_offsets, first_part, num_parts: as an AnnotationFile and a CocoIndex have them.

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
    """Computes the intersection over union of boxes [K, 4] x1, y1, x2, y2, row by row; [K], 0 for those without area.

    NaN where a box is.
    """
    sides = np.minimum(boxes[:, 2:], others[:, 2:]) - np.maximum(boxes[:, :2], others[:, :2])
    shared = np.maximum(sides, 0).prod(axis=1)
    areas = [np.maximum(b[:, 2:] - b[:, :2], 0).prod(axis=1) for b in (boxes, others)]
    return shared / np.maximum(areas[0] + areas[1] - shared, 1e-9)


def _are_shares(numbers: np.ndarray) -> bool:
    """Tells whether all numbers lie in 0..1, and not only because they are the corners of a few pixels."""
    if not numbers.size or numbers.min() < 1 - _ROUNDING or numbers.max() > _ROUNDING:
        return False
    return bool(np.mean(numbers % 1 != 0) > 0.5)


def _in_pixels(file: AnnotationFile, limits: np.ndarray) -> np.ndarray:
    rows = np.flatnonzero(file.num_parts > 0)
    lengths = np.diff(file.part_offsets)
    width_height = np.ones((len(lengths), 2))  # of the image, for each polygon
    for row in rows.tolist():
        first = file.first_part[row]
        width_height[first : first + file.num_parts[row]] = limits[row]
    return file.coordinates * np.repeat(width_height, lengths // 2, axis=0).ravel()


def _are_corners(file: AnnotationFile, limits: np.ndarray) -> bool:
    first, second = file.boxes[:, :2], file.boxes[:, 2:]
    as_corners = (second > first).all(axis=1) & (second <= limits + 1).all(axis=1)
    if len(as_corners) < _ENOUGH or as_corners.mean() < 0.99:
        return False
    bounds = polygon_bounds(file.coordinates, file.part_offsets, file.first_part, file.num_parts)
    known = ~np.isnan(bounds[:, 0])
    if known.sum() >= _ENOUGH:
        corners = overlaps(file.boxes[known], bounds[known])
        sizes = overlaps(np.concatenate([first, first + second], axis=1)[known], bounds[known])
        return bool(np.median(corners) > 0.8 and np.mean(corners > sizes) > 0.9)
    # Without outlines: boxes that as sizes pass the border by more than anybody's rounding does.
    beyond = (first + second > 1.05 * limits + 1).any(axis=1)
    return bool(beyond.sum() >= _ENOUGH and beyond.mean() > 0.2)
