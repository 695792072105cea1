"""Images with boxes and masks as the data of a page on which they are searched, filtered and drawn by the browser.

``templates/gallery.js`` draws them. A page is one file, so what it holds is limited: thumbnails and outlines of masks
are added until they fill a number of bytes, the most important first. Every image is also linked where it lies.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from maskrcnn_jax import page
from maskrcnn_jax.data.run_lengths import decode_crop
from maskrcnn_jax.inference.draw import instance_colour, shrink
from maskrcnn_jax.paths import in_bucket

THUMBNAIL_SIDE = 480  # pixels of the longer side
THUMBNAIL_BYTES = 6 << 20  # of all thumbnails; some 200 photographs
OUTLINE_BYTES = 4 << 20  # of all outlines of objects or of a run; some 50,000
SIZES = {"small": 32**2, "medium": 96**2, "large": np.inf}  # square pixels below which they end, as COCO's


def classes(names: Sequence[str]) -> list[dict[str, str]]:
    """Return names with the colours that mean them on the whole page."""
    return [{"name": name, "colour": colour(i)} for i, name in enumerate(names)]


def colour(index: int) -> str:
    """Return the colour of a class, such as "#2673ff"."""
    return "#{:02x}{:02x}{:02x}".format(*instance_colour(index))


def images(
    names: Sequence[str], sizes: np.ndarray, paths: Sequence[Path | None], thumbnails: dict[int, str], file: Path
) -> dict[str, Any]:
    """Return N images as data of a page.

    Args:
        names: N names.
        sizes: [N, 2] (height, width) in pixels.
        paths: where the images lie; None for one that is no file.
        thumbnails: row -> source of the image, as ``thumbnails`` returns them.
        file: of the page.
    """
    return {
        "names": list(names),
        "sizes": page.pack(sizes, np.int32),
        "links": [link(path, file) for path in paths],
        "thumbnails": {str(row): source for row, source in thumbnails.items()},
    }


def link(path: Path | None, file: Path) -> str:
    """Return the path of an image from the folder of a page; nothing if a browser cannot follow it there."""
    if path is None or in_bucket(path) or in_bucket(file):
        return ""
    return os.path.relpath(os.path.realpath(path), os.path.realpath(file.parent))


def thumbnails(
    rows: Iterable[int], read: Callable[[int], np.ndarray | None], limit: int = THUMBNAIL_BYTES
) -> dict[int, str]:
    """Return row -> source of images, the first of the rows that fit into the limit in bytes.

    Args:
        rows: of the images, the most important first.
        read: takes a row and returns [h, w, 3] uint8 RGB, or None if the image cannot be read.
        limit: of all sources, in bytes.
    """
    sources: dict[int, str] = {}
    used = 0
    for row in rows:
        if used >= limit:
            break
        image = read(row)
        if image is not None:
            sources[row] = page.image_source(shrink(image, THUMBNAIL_SIDE), quality=75)
            used += len(sources[row])
    return sources


def spread(count: int, number: int) -> np.ndarray:
    """Return a number of rows of ``count``, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(number, count)).astype(np.int64)) if count else np.zeros(0, int)


def instances(
    image_rows: np.ndarray, num_images: int, labels: np.ndarray, boxes: np.ndarray, areas: np.ndarray, outlines: dict
) -> dict[str, Any]:
    """Return K objects or detections as data of a page.

    Args:
        image_rows: [K] the image of each, ascending.
        num_images: N.
        labels: [K] places in the classes of the page.
        boxes: [K, 4] x, y, width, height in pixels.
        areas: [K] in square pixels.
        outlines: as ``outlines`` returns them.
    """
    return {
        "offsets": page.pack(np.searchsorted(image_rows, np.arange(num_images + 1)), np.int32),
        "classes": page.pack(labels, np.uint16),
        "boxes": page.pack(boxes, np.float32),
        "sizes": page.pack(np.searchsorted(list(SIZES.values()), areas, side="right").clip(0, 2), np.uint8),
        "outlines": outlines,
    }


def outlines(
    order: Iterable[int], count: int, trace: Callable[[int], list[np.ndarray]], limit: int = OUTLINE_BYTES
) -> dict[str, Any]:
    """Return outlines of masks as data of a page, the first that fit into the limit in bytes.

    Args:
        order: of the K masks, the most important first.
        count: K.
        trace: takes the place of a mask and returns its outlines, [n, 2] x, y in pixels each.
        limit: of all outlines, in bytes.

    Returns:
        "offsets" [K + 1] into "points": for each outline the number of its corners, then x, y of each.
    """
    found: list[np.ndarray] = [np.zeros(0, np.uint16)] * count
    used = 0
    for i in order:
        if used >= limit:
            break
        parts = [part.reshape(-1) for part in trace(i)]
        with_counts = [np.concatenate([[len(part) // 2], part]) for part in parts]
        if with_counts:
            found[i] = np.concatenate(with_counts).round().clip(0, 65535).astype(np.uint16)
            used += found[i].nbytes
    offsets = np.cumsum([0, *map(len, found)])
    return {
        "offsets": page.pack(offsets, np.int32),
        "points": page.pack(np.concatenate([np.zeros(0, np.uint16), *found]), np.uint16),
    }


def trace_mask(rle: dict) -> list[np.ndarray]:
    """Return the outlines of a run-length mask, [n, 2] x, y in pixels each; none if the mask is malformed.

    They are for the screen: through the middles of the outermost pixels, in half the time of
    ``inference.polygons``, whose outlines run around the pixels.
    """
    try:
        crop = decode_crop(rle)
    except ValueError:
        return []
    if not crop.mask.size:
        return []
    mask = np.ascontiguousarray(crop.mask, np.uint8)
    contours, _ = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    return simplify([contour.reshape(-1, 2) + (crop.x, crop.y) for contour in contours])


def simplify(polygons: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return polygons [n, 2] with fewer corners, moved by at most one hundredth of the size of the object."""
    polygons = [polygon.astype(np.float32) for polygon in polygons if len(polygon) >= 3]
    if not polygons:
        return []
    corners = np.concatenate(polygons)
    tolerance = max(0.7, 0.01 * float(np.ptp(corners, axis=0).max()))
    simple = [cv2.approxPolyDP(polygon.reshape(-1, 1, 2), tolerance, True).reshape(-1, 2) for polygon in polygons]
    return [polygon for polygon in simple if len(polygon) >= 3]
