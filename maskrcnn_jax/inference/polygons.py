"""Masks as polygons along the edges of their pixels, which hold exactly the pixels of the mask. Without JAX.

pycocotools and OpenCV give outlines through the centres of the outermost pixels, which lose half a pixel on every side
when they are filled again, and nothing at all of a line one pixel wide.
"""

import cv2
import numpy as np

from maskrcnn_jax.data.run_lengths import Crop, cut_out


def mask_to_polygons(mask: np.ndarray | Crop) -> list[list[np.ndarray]]:
    """Return the outlines of the regions of a mask, and the outlines of their holes.

    A pixel is in the mask if and only if its centre is inside an outline and in none of that region's holes. Pixels
    that touch at a corner only are of different regions. So no ring touches itself, and every region is a valid
    polygon of GeoJSON and shapely.

    Args:
        mask: [h, w] bool or integers, or a crop of such a mask, whose place is added to the points.

    Returns:
        For each region, the largest first, its rings: the outline, then those of its holes. A ring is [N, 2] float64
        ``x, y`` in pixels of the image, whose first pixel has its corners at 0 and 1. All N >= 4 points are corners;
        the first one is not repeated at the end. On the screen, outlines run counter-clockwise and holes clockwise.

    Example:
        >>> mask_to_polygons(np.array([[0, 1, 1]]))
        [[array([[1., 0.], [1., 1.], [3., 1.], [3., 0.]])]]
    """
    # Only the box of a region is searched, or each small object of a large image would cost as much as the image.
    crop = mask if isinstance(mask, Crop) else cut_out(np.asarray(mask).astype(bool, copy=False))
    if not crop.mask.any():
        return []
    pixels = np.ascontiguousarray(crop.mask, np.uint8)
    _, labels, stats, _ = cv2.connectedComponentsWithStats(pixels, connectivity=4)
    areas = stats[1:, cv2.CC_STAT_AREA]
    regions = []
    for label in np.argsort(-areas, kind="stable") + 1:
        x, y, width, height, _ = stats[label]
        region = labels[y : y + height, x : x + width] == label
        regions.append([ring + np.array([crop.x + x, crop.y + y]) for ring in _rings(region)])
    return regions


def _rings(region: np.ndarray) -> list[np.ndarray]:
    """Return the outline of a region [h, w] without parts, then its holes."""
    # OpenCV's contours go through pixels. With every pixel doubled, its left half has an even and its right half an
    # odd coordinate, from which the edge follows that the contour runs along.
    doubled = np.repeat(np.repeat(region.astype(np.uint8), 2, axis=0), 2, axis=1)
    contours, hierarchy = cv2.findContours(doubled, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    order = np.argsort(hierarchy[0, :, 3] >= 0, kind="stable")  # holes have a parent
    return [_corners((contours[index][:, 0] + 1) // 2).astype(np.float64) for index in order]


def _corners(points: np.ndarray) -> np.ndarray:
    """Leave out the points [N, 2] of a ring at which it does not turn."""
    points = points[(points != np.roll(points, 1, axis=0)).any(axis=1)]
    arriving, leaving = points - np.roll(points, 1, axis=0), np.roll(points, -1, axis=0) - points
    return points[arriving[:, 0] * leaving[:, 1] != arriving[:, 1] * leaving[:, 0]]


def simplify(ring: np.ndarray, tolerance: float) -> np.ndarray:
    """Leave out points of a ring [N, 2] from which the rest strays by no more than a tolerance in pixels.

    A ring that would lose its area stays as it is.
    """
    simple = cv2.approxPolyDP(ring.astype(np.float32), tolerance, closed=True)[:, 0].astype(np.float64)
    return simple if len(simple) > 2 and len(ring) > 4 else ring


def join_holes(rings: list[np.ndarray]) -> np.ndarray:
    """Return one ring for an outline and its holes, for programs that know no holes.

    Where the outline comes closest to a hole, it goes there, around it and the same way back. Such a cut has no width,
    so that filling the ring leaves the hole free.

    Args:
        rings: as ``mask_to_polygons`` returns them for a region.

    Returns:
        [N, 2] points.
    """
    ring, *holes = rings
    for hole in holes:
        distances = ((ring[:, None] - hole[None]) ** 2).sum(axis=2)
        i, j = np.unravel_index(np.argmin(distances), distances.shape)
        around = np.concatenate([hole[j:], hole[: j + 1]])
        ring = np.concatenate([ring[: i + 1], around, ring[i:]])
    return ring
