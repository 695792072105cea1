"""The images of checked splits with their annotations and findings, as the data of the dataset page."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from maskrcnn_jax import gallery, page
from maskrcnn_jax.checking.dataset import Split
from maskrcnn_jax.data.coco import CocoDataset
from maskrcnn_jax.data.findings import ANNOTATIONS, IMAGES, Finding
from maskrcnn_jax.data.image_headers import image_size
from maskrcnn_jax.data.images import decode_image
from maskrcnn_jax.paths import read_bytes

MAX_IMAGES = 5000  # on the page, of all splits
_MAX_PIXELS = 1 << 26  # of an image or mask that is decoded only to be shown
_MAX_COORDINATE = 65535


@dataclass(frozen=True)
class _Part:
    """The images of a split that are on the page."""

    split: Split
    index: CocoDataset
    rows: np.ndarray  # [n] of the images in the index, ascending
    first_image: int  # row on the page of the first of them
    first_object: int  # likewise of their annotations

    @property
    def objects(self) -> np.ndarray:
        """Rows of the annotations in the index, [k]."""
        starts, ends = self.index.offsets[self.rows], self.index.offsets[self.rows + 1]
        return np.concatenate([np.zeros(0, np.int64), *map(np.arange, starts, ends)])

    @property
    def image_rows(self) -> np.ndarray:
        """Row on the page of the image of each annotation, [k]."""
        return self.first_image + np.repeat(np.arange(len(self.rows)), np.diff(self.index.offsets)[self.rows])


def images_data(splits: Sequence[Split], file: Path) -> dict[str, Any]:
    """Return the data of the page.

    Args:
        splits: the checked splits; of many images, those with findings come first.
        file: of the page.
    """
    parts = _parts([split for split in splits if split.data is not None])
    names = list(dict.fromkeys(name for part in parts for name in part.index.categories.names))
    findings = [_places(part, finding) for part in parts for finding in part.split.findings]
    image_names = [str(name) for part in parts for name in part.index.file_names[part.rows]]
    paths = [part.index.image_path(row) for part in parts for row in part.rows.tolist()]
    sizes = np.concatenate([np.zeros((0, 2), np.int32), *(part.index.sizes[part.rows] for part in parts)])
    order = _important_first(len(paths), [images for images, _ in findings])
    kinds = [finding for part in parts for finding in part.split.findings]
    return {
        "classes": gallery.classes(names),
        "splits": [part.split.name for part in parts],
        "splitOf": page.pack(np.repeat(np.arange(len(parts)), [len(part.rows) for part in parts]), np.uint8),
        "total": sum(len(part.index) for part in parts),
        "images": gallery.images(
            image_names, sizes, paths, gallery.thumbnails(order, lambda row: read_picture(paths[row])), file
        ),
        "objects": _objects(parts, names, len(paths)),
        "findings": [
            {
                "kind": str(finding.kind),
                "isError": finding.is_error,
                "images": page.pack(images, np.int32),
                "objects": page.pack(objects, np.int32),
            }
            for finding, (images, objects) in zip(kinds, findings, strict=True)
        ],
    }


def read_picture(path: Path) -> np.ndarray | None:
    """Read an image, [h, w, 3] uint8 RGB; None if it cannot be read or is too large to be shown."""
    try:
        data = read_bytes(path)
        height, width = image_size(data) or (0, 0)
        return decode_image(data) if height * width <= _MAX_PIXELS else None
    except (OSError, ValueError):  # a UserError is a ValueError
        return None


def _parts(splits: Sequence[Split]) -> list[_Part]:
    """Choose the images of each split: all, or those with findings first."""
    parts: list[_Part] = []
    first_image = first_object = 0
    indices = [split.data for split in splits if split.data is not None]
    for split, index, limit in zip(splits, indices, _limits([len(index) for index in indices]), strict=True):
        rows = np.arange(len(index))
        if len(rows) > limit:
            places = [_rows(index, finding)[0] for finding in split.findings]
            found = np.unique(np.concatenate([np.zeros(0, np.int64), *places]))[:limit]
            others = np.setdiff1d(rows, found)
            rows = np.sort(np.concatenate([found, others[gallery.spread(len(others), limit - len(found))]]))
        part = _Part(split, index, rows, first_image, first_object)
        parts.append(part)
        first_image, first_object = first_image + len(rows), first_object + len(part.objects)
    return parts


def _limits(counts: Sequence[int]) -> list[int]:
    """Return how many images of each split are on the page: all of small splits, as many of each large one."""
    limits, left = [0] * len(counts), MAX_IMAGES
    for done, i in enumerate(sorted(range(len(counts)), key=counts.__getitem__)):
        limits[i] = min(counts[i], left // (len(counts) - done))
        left -= limits[i]
    return limits


def _rows(index: CocoDataset, finding: Finding) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of the images and of the annotations that a finding is about, as far as the index has them."""
    nothing = np.zeros(0, np.int64)
    if finding.section == IMAGES:
        return np.flatnonzero(np.isin(index.image_places, finding.rows)), nothing
    if finding.section == ANNOTATIONS:
        objects = np.flatnonzero(np.isin(index.places, finding.rows))
        return np.unique(index.image_rows[objects]), objects
    return nothing, nothing


def _places(part: _Part, finding: Finding) -> tuple[np.ndarray, np.ndarray]:
    """Return the images and objects of the page that a finding is about."""
    images, objects = _rows(part.index, finding)
    shown = np.flatnonzero(np.isin(part.rows, images)), np.flatnonzero(np.isin(part.objects, objects))
    return part.first_image + shown[0], part.first_object + shown[1]


def _important_first(count: int, found: list[np.ndarray]) -> list[int]:
    """Return the images to make thumbnails of: in turn one with a finding, and one of those evenly spread."""
    with_findings = np.unique(np.concatenate([np.zeros(0, np.int64), *found])).tolist()
    both = zip(_scattered(with_findings), _scattered(list(range(count))), strict=False)
    order = [row for pair in both for row in pair] + _scattered(list(range(count)))
    return list(dict.fromkeys(order))


def _scattered(rows: list[int]) -> list[int]:
    """Return rows in an order whose beginning is evenly spread, wherever it is cut off."""
    places = np.arange(len(rows)) * 0.618033988749895 % 1  # steps of the golden ratio
    return [rows[i] for i in np.argsort(np.argsort(places, kind="stable"), kind="stable")] if rows else []


def _objects(parts: Sequence[_Part], names: list[str], num_images: int) -> dict[str, Any]:
    label_of = {name: i for i, name in enumerate(names)}
    labels, boxes, areas, crowds = [], [np.zeros((0, 4))], [], []
    traced: list[tuple[_Part, int]] = []
    for part in parts:
        index, objects = part.index, part.objects
        of_class = {label: label_of[index.categories.name(label)] for label in index.categories.labels}
        labels += [of_class.get(label, len(names)) for label in index.labels[objects].tolist()]
        corners = index.boxes[objects].astype(np.float64)
        boxes.append(np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1))
        of_boxes = np.prod(boxes[-1][:, 2:], axis=1)
        areas += np.where(np.isnan(index.areas[objects]), of_boxes, index.areas[objects]).tolist()
        crowds += index.crowd[objects].tolist()
        traced += [(part, row) for row in objects.tolist()]
    order = np.argsort(-np.array(areas), kind="stable").tolist()
    data = gallery.instances(
        np.concatenate([np.zeros(0, np.int64), *(part.image_rows for part in parts)]),
        num_images,
        np.array(labels, np.int64),
        np.concatenate(boxes),
        np.array(areas, np.float64),
        gallery.outlines(order, len(traced), lambda i: _trace(traced[i][0].index, traced[i][1])),
    )
    return data | {
        "crowds": page.pack(crowds, np.uint8),
        "ids": [str(part.index.annotation_ids[row]) for part, row in traced],
    }


def _trace(index: CocoDataset, row: int) -> list[np.ndarray]:
    first, num = index.first_part[row], index.num_parts[row]
    if num > 0:
        bounds = index.part_offsets[first : first + num + 1]
        points = [index.coordinates[bounds[i] : bounds[i + 1]] for i in range(num)]
        # Annotations may hold any numbers; of a number and NaN, fmax is the number.
        clean = [np.fmin(np.fmax(part, -_MAX_COORDINATE), _MAX_COORDINATE) for part in points]
        return gallery.simplify([part[: len(part) // 2 * 2].reshape(-1, 2) for part in clean])
    image = int(np.searchsorted(index.offsets, row, side="right")) - 1
    height, width = index.sizes[image].tolist()
    if num < 0 or height * width > _MAX_PIXELS:
        return []
    return gallery.trace_mask(index.rle(row, height, width))
