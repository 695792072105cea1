"""Problems in the annotations of a split that can be found without opening images, and that the reader does not see.

Training runs these checks before it starts.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from maskrcnn_jax.checking.anchors import Anchors, check_anchors
from maskrcnn_jax.checking.examples import annotations_finding, images_finding, listed
from maskrcnn_jax.data.annotations import repetitions
from maskrcnn_jax.data.coco import CocoDataset
from maskrcnn_jax.data.findings import Finding, Kind
from maskrcnn_jax.data.formats import overlaps, polygon_bounds
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.options import Options

_log = logging.getLogger(__name__)

MISMATCH = 0.5  # IoU of a box with the box around its mask below which one of them is wrong; Kind.MISFIT says "half"
_MANY_CROWDS = 0.2  # share of the annotations
_MANY_EMPTY = 0.5  # share of the images
_FEW_OBJECTS = 10  # of a category
_RARE = 1e-3  # objects of a category, as a share of those of the most common one


def check_before_training(options: Options, index: CocoDataset) -> None:
    """Check the training annotations and log a line for every warning.

    Raises:
        UserError: an error that the reader does not notice.
    """
    most = options.model.box_detections_per_img
    stop_or_warn(check_index(index, Anchors.from_options(options), max_detections=most), options.data.train_split)


def stop_or_warn(findings: Sequence[Finding], split: str) -> None:
    """Log a line for every warning.

    Raises:
        UserError: the first error among the findings.
    """
    for finding in findings:
        if finding.is_error:
            raise UserError(finding.sentence)
    for finding in findings:
        such = f", such as {'; '.join(finding.examples)}" if finding.examples else ""
        _log.warning("%s: %s%s", split, finding.sentence, such)


def check_index(
    index: CocoDataset,
    anchors: Anchors | None = None,
    *,
    max_detections: int | None = None,
    evaluated: bool | None = False,
) -> list[Finding]:
    """Check the annotations of a split.

    Args:
        index: of the split.
        anchors: of the model; without them, the sizes of objects are not checked.
        max_detections: detections of an image that the model makes; without it, numbers of objects are not checked.
        evaluated: whether the split is used for evaluation: few objects are not a problem there, but repeated ids are.
            None if that is not known, as of a single file.

    Returns:
        Findings, with rows of the index.
    """
    return [
        *_same_files(index),
        *_annotation_ids(index, evaluated),
        *_same_annotations(index),
        *_polygons(index),
        *(check_anchors(index, anchors) if anchors else ()),
        *_numbers_of_objects(index, max_detections),
        *_shares(index),
        *_categories(index, evaluated),
    ]


def objects_per_category(index: CocoDataset) -> dict[str, int]:
    """Return the number of objects of each category without crowds; by name, in order of category id."""
    counts = np.bincount(index.labels[~index.crowd], minlength=index.categories.num_classes)
    return {
        name: int(counts[label]) for name, label in zip(index.categories.names, index.categories.labels, strict=True)
    }


def misfits(index: CocoDataset, rows: np.ndarray, bounds: np.ndarray | dict[int, np.ndarray]) -> list[Finding]:
    """Return the finding of boxes that do not fit their masks.

    Args:
        index: of the split.
        rows: of the annotations.
        bounds: by row, the box around the mask (x1, y1, x2, y2).
    """

    def describe(row: int) -> str:
        box, around = (" ".join(f"{v:.0f}" for v in b) for b in (index.boxes[row], bounds[row]))
        return f": box {box}, mask within {around} (x1 y1 x2 y2)"

    return annotations_finding(index, Kind.MISFIT, rows, describe)


def _same_files(index: CocoDataset) -> list[Finding]:
    return images_finding(index, Kind.SAME_FILE, repetitions(index.file_names))


def _annotation_ids(index: CocoDataset, evaluated: bool | None) -> list[Finding]:
    repeated = annotations_finding(index, Kind.SAME_ID, repetitions(index.annotation_ids))
    if evaluated is False:
        return repeated
    zero = annotations_finding(index, Kind.ZERO_ID, np.flatnonzero(index.annotation_ids == 0))
    return [replace(f, is_error=f.kind.severity.is_error(evaluated=bool(evaluated))) for f in repeated + zero]


def _same_annotations(index: CocoDataset) -> list[Finding]:
    numbers = np.column_stack([index.image_rows, index.labels, index.boxes.view(np.int32)]).astype(np.uint64)
    hashes = np.zeros(len(numbers), np.uint64)
    for column in numbers.T:
        hashes = (hashes ^ column) * np.uint64(0x9E3779B97F4A7C15)
        hashes ^= hashes >> np.uint64(29)
    order = np.argsort(hashes, kind="stable")
    alike = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
    twice: list[int] = []
    first = -1
    for earlier, later in zip(order[alike].tolist(), order[alike + 1].tolist(), strict=True):
        # Of three in a row, the others are compared with the first one.
        first = first if twice and twice[-1] == earlier else earlier
        if (numbers[first] == numbers[later]).all() and index.mask_bytes(first) == index.mask_bytes(later):
            twice.append(later)
    return annotations_finding(index, Kind.SAME_ANNOTATION, np.sort(np.array(twice, np.int64)))


def _polygons(index: CocoDataset) -> list[Finding]:
    bounds = polygon_bounds(index.coordinates, index.part_offsets, index.first_part, index.num_parts)
    limits = index.sizes[index.image_rows][:, [1, 0, 1, 0]]
    inside = np.clip(bounds, 0, limits)
    outside = (inside[:, 2:] <= inside[:, :2]).any(axis=1)
    wrong = (overlaps(index.boxes, inside) < MISMATCH) & ~outside
    return [
        *annotations_finding(index, Kind.EMPTY_MASK, np.flatnonzero(outside)),
        *misfits(index, np.flatnonzero(wrong), inside),
    ]


def _numbers_of_objects(index: CocoDataset, max_detections: int | None) -> list[Finding]:
    if max_detections is None:
        return []
    numbers = index.num_objects
    rows = np.flatnonzero(numbers > max_detections)
    return images_finding(index, Kind.MANY_OBJECTS, rows, limit=max_detections, most=numbers.max(initial=0))


def _shares(index: CocoDataset) -> list[Finding]:
    if index.iscrowd.all() and len(index.iscrowd):
        return annotations_finding(index, Kind.ONLY_CROWDS, np.arange(len(index.iscrowd)))
    crowds, empty = np.flatnonzero(index.crowd), np.flatnonzero(index.num_objects == 0)
    found = []
    if len(crowds) > _MANY_CROWDS * len(index.crowd):
        found += annotations_finding(index, Kind.CROWDS, crowds, total=len(index.crowd))
    if len(empty) > _MANY_EMPTY * len(index):
        found += images_finding(index, Kind.EMPTY, empty, total=len(index))
    return found


def _categories(index: CocoDataset, evaluated: bool | None) -> list[Finding]:
    found = []
    twice = [name for name, count in Counter(index.categories.names).items() if count > 1]
    if twice:
        found.append(Kind.SAME_NAME.finding(count=len(twice), names=listed(twice)))
    counts = objects_per_category(index)
    if evaluated or not sum(counts.values()):
        return found
    unused = [name for name, count in counts.items() if not count]
    if unused:
        found.append(Kind.UNUSED_CATEGORY.finding(count=len(unused), total=len(counts), names=listed(unused)))
    most = max(counts, key=counts.__getitem__)
    few = [
        f"{name} ({count})"
        for name, count in counts.items()
        if count and (count < _FEW_OBJECTS or count < _RARE * counts[most])
    ]
    if few:
        found.append(Kind.RARE_CATEGORY.finding(count=len(few), most=most, num_most=counts[most], names=listed(few)))
    return found
