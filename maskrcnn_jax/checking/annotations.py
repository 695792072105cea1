"""What is wrong, or odd, in the annotations of a dataset, told from its index alone: no image is opened.

Training looks at this before it starts; ``check_dataset`` builds on it. An error is what training cannot go on with or
learns wrongly for sure. A warning is what it drops, mends, or has little use of, and what may be meant.
"""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from maskrcnn_jax.data.coco import CocoDataset
from maskrcnn_jax.data.formats import overlaps, polygon_bounds
from maskrcnn_jax.data.transforms import resized_sizes
from maskrcnn_jax.errors import UserError

_log = logging.getLogger(__name__)

NUM_EXAMPLES = 3  # of each finding
MISMATCH = 0.5  # overlap of a box with the box around its mask below which one of them is wrong
_MANY_CROWDS = 0.2  # share of the annotations
_MANY_EMPTY = 0.5  # share of the images
_MANY_UNMATCHED = 0.01  # share of the objects; every dataset has a few
_FEW_OBJECTS = 10  # of a category
_RARE = 1e-3  # objects of a category, as a share of those of the most common one

SAME_FILE = "images listed more than once"
SAME_ANNOTATION = "annotations given more than once"
SAME_ID = "annotation ids given more than once"
ZERO_ID = "annotations with the id 0"
MISFIT = "boxes that do not fit their masks"
EMPTY_MASK = "masks without a pixel in their image"
SMALL = "objects too small for the anchors"
LARGE = "objects too large or too thin for the anchors"
CROWDS = "many crowds"
EMPTY = "many images without objects"
UNUSED_CATEGORY = "categories without objects"
RARE_CATEGORY = "categories with few objects"
SAME_NAME = "categories of the same name"


@dataclass(frozen=True)
class Anchors:
    """What decides whether an object can be matched to anchors."""

    sides: np.ndarray  # [A, 2] float (width, height) of the anchors at one place of every level, pixels
    background_iou: float  # below, an anchor is background
    short_side: int  # images are resized so, see transforms.resized_sizes
    long_side: int
    resize: str


@dataclass(frozen=True, eq=False)
class Finding:
    """Something wrong or odd, at so many places."""

    kind: str
    is_error: bool
    sentence: str  # what there is, and what to do
    section: str = ""  # images, annotations or categories, of which there are rows
    rows: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # of the index
    examples: Sequence[str] = ()  # images and annotations, a few


def check_index(index: CocoDataset, anchors: Anchors | None = None, *, evaluated: bool = False) -> list[Finding]:
    """Looks for what is wrong or odd in a split.

    Args:
        index: of the split.
        anchors: of the model; without them nothing is said about sizes.
        evaluated: it is a split to evaluate on, so that few objects are no matter, but ids are.

    Returns:
        Findings, with rows of the index.
    """
    found = [
        _same_files(index),
        *_annotation_ids(index, evaluated),
        _same_annotations(index),
        *_polygons(index),
        *(_unmatched(index, anchors) if anchors else ()),
        *_shares(index),
        *_categories(index, evaluated),
    ]
    return [finding for finding in found if finding is not None]


def stop_or_warn(findings: Sequence[Finding], split: str) -> None:
    """Logs a line for every warning.

    Raises:
        UserError: the first error among the findings.
    """
    for finding in findings:
        if finding.is_error:
            raise UserError(finding.sentence)
    for finding in findings:
        such = f", such as {'; '.join(finding.examples)}" if finding.examples else ""
        _log.warning("%s: %s%s", split, finding.sentence, such)


def images_of(index: CocoDataset) -> np.ndarray:
    """Returns the row of the image of every annotation, [K]."""
    return np.repeat(np.arange(len(index)), np.diff(index.offsets))


def annotations_finding(
    index: CocoDataset,
    kind: str,
    rows: np.ndarray,
    sentence: str,
    detail: Callable[[int], str] = lambda row: "",
    is_error: bool = False,
) -> Finding | None:
    """Makes a finding about rows of annotations, or none of none; ``detail`` adds to an example."""
    if not len(rows):
        return None
    images = np.searchsorted(index.offsets, rows[:NUM_EXAMPLES], side="right") - 1
    examples = [
        f"{index.file_names[image]}, annotation {index.annotation_ids[row]}{detail(row)}"
        for image, row in zip(images, rows.tolist(), strict=False)
    ]
    return Finding(kind, is_error, sentence, "annotations", np.asarray(rows), examples)


def images_finding(
    index: CocoDataset, kind: str, rows: np.ndarray, sentence: str, is_error: bool = False
) -> Finding | None:
    """Makes a finding about rows of images, or none of none."""
    if not len(rows):
        return None
    examples = [str(index.file_names[row]) for row in rows[:NUM_EXAMPLES]]
    return Finding(kind, is_error, sentence, "images", np.asarray(rows), examples)


def _same_files(index: CocoDataset) -> Finding | None:
    rows = range(len(index))
    first = dict(zip(reversed(index.file_names.tolist()), reversed(rows), strict=True))  # by name, the earliest stays
    later = np.setdiff1d(rows, list(first.values()))
    return images_finding(
        index,
        SAME_FILE,
        later,
        f"{len(later)} images in {index.image_dir} are listed before under another id, so that the objects of one are "
        "background in the other; list every file once, with all of its annotations",
        is_error=True,
    )


def _annotation_ids(index: CocoDataset, evaluated: bool) -> list[Finding | None]:
    first = np.unique(index.annotation_ids, return_index=True)[1]
    later = np.setdiff1d(np.arange(len(index.annotation_ids)), first)
    zero = np.flatnonzero(index.annotation_ids == 0)
    return [
        annotations_finding(
            index,
            SAME_ID,
            later,
            f"{len(later)} annotations have the id of another one, which an evaluation on them mistakes for it; give "
            "each an id of its own",
            is_error=evaluated,
        ),
        annotations_finding(
            index,
            ZERO_ID,
            zero if evaluated else zero[:0],
            "an annotation has the id 0, by which COCO's evaluation means none, and counts what finds it as wrong; "
            "count from 1",
        ),
    ]


def _same_annotations(index: CocoDataset) -> Finding | None:
    numbers = np.column_stack([images_of(index), index.labels, index.boxes.view(np.int32)]).astype(np.uint64)
    hashes = np.zeros(len(numbers), np.uint64)
    for column in numbers.T:
        hashes = (hashes ^ column) * np.uint64(0x9E3779B97F4A7C15)
        hashes ^= hashes >> np.uint64(29)
    order = np.argsort(hashes, kind="stable")
    alike = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
    twice, first = [], -1
    for earlier, later in zip(order[alike].tolist(), order[alike + 1].tolist(), strict=True):
        # Of three in a row the first one stays what the others are compared with.
        first = first if twice and twice[-1] == earlier else earlier
        if (numbers[first] == numbers[later]).all() and index.mask_bytes(first) == index.mask_bytes(later):
            twice.append(later)
    return annotations_finding(
        index,
        SAME_ANNOTATION,
        np.sort(np.array(twice, np.int64)),
        f"{len(twice)} annotations have the image, category, box and mask of another one; remove them",
    )


def _polygons(index: CocoDataset) -> list[Finding | None]:
    bounds = polygon_bounds(index.coordinates, index.part_offsets, index.first_part, index.num_parts)
    limits = index.sizes[images_of(index)][:, [1, 0, 1, 0]]
    inside = np.clip(bounds, 0, limits)
    outside = (inside[:, 2:] <= inside[:, :2]).any(axis=1)
    misfits = (overlaps(index.boxes, inside) < MISMATCH) & ~outside
    return [
        empty_mask_finding(index, np.flatnonzero(outside)),
        misfit_finding(index, np.flatnonzero(misfits), inside),
    ]


def empty_mask_finding(index: CocoDataset, rows: np.ndarray) -> Finding | None:
    """Makes the finding of masks without a pixel."""
    sentence = f"{len(rows)} masks have no pixel in their image, and are learnt as empty; correct or remove them"
    return annotations_finding(index, EMPTY_MASK, rows, sentence)


def misfit_finding(index: CocoDataset, rows: np.ndarray, bounds: np.ndarray) -> Finding | None:
    """Makes the finding of boxes that are not around their masks, whose boxes are ``bounds`` [K, 4]."""

    def detail(row: int) -> str:
        box, around = (" ".join(f"{v:.0f}" for v in b) for b in (index.boxes[row], bounds[row]))
        return f": box {box}, mask within {around} (x1 y1 x2 y2)"

    sentence = (
        f"{len(rows)} boxes overlap the box around their mask by less than {MISMATCH} (intersection over union), so "
        "that one of the two is wrong; correct them"
    )
    return annotations_finding(index, MISFIT, rows, sentence, detail)


def best_overlaps(index: CocoDataset, anchors: Anchors) -> np.ndarray:
    """Computes how well the best anchor can overlap each object, placed as well as possible; [K] float.

    An anchor of sides a, b overlaps a box of sides w, h by at most o / (w h + a b - o), o = min(w, a) min(h, b).
    """
    sizes = resized_sizes(index.sizes, anchors.short_side, anchors.long_side, anchors.resize)
    scale = (sizes / index.sizes)[images_of(index), ::-1]
    width, height = ((index.boxes[:, 2:] - index.boxes[:, :2]) * scale).T
    best = np.zeros(len(width))
    for a, b in anchors.sides:
        shared = np.minimum(width, a) * np.minimum(height, b)
        best = np.maximum(best, shared / (width * height + a * b - shared))
    return best


def _unmatched(index: CocoDataset, anchors: Anchors) -> list[Finding | None]:
    unmatched = (best_overlaps(index, anchors) < anchors.background_iou) & ~index.crowd
    sizes = resized_sizes(index.sizes, anchors.short_side, anchors.long_side, anchors.resize)
    scale = (sizes / index.sizes)[images_of(index), ::-1]
    areas = ((index.boxes[:, 2:] - index.boxes[:, :2]) * scale).prod(axis=1)
    smallest = anchors.sides[anchors.sides.prod(axis=1).argmin()]
    small = unmatched & (areas < smallest.prod())
    num = int(np.count_nonzero(~index.crowd))
    found = []
    for kind, rows, what, remedy in (
        (SMALL, small, "small", "lower --config.model.anchor_sizes, or enlarge images by --config.data.short_side"),
        (LARGE, unmatched & ~small, "large or too thin", "change --config.model.anchor_sizes or aspect_ratios"),
    ):
        rows = np.flatnonzero(rows)
        if len(rows) < _MANY_UNMATCHED * num:
            continue
        sides = f"{anchors.short_side}..{anchors.long_side}"
        sides = str(anchors.short_side) if anchors.short_side == anchors.long_side else sides
        sentence = (
            f"{len(rows)} of {num} objects are too {what} for the anchors: with images resized to "
            f"{sides} pixels none can overlap them by {anchors.background_iou}, the "
            f"smallest being {smallest[0]:.0f}x{smallest[1]:.0f}, so that each trains its nearest anchor alone; "
            f"{remedy}"
        )
        found.append(
            annotations_finding(
                index,
                kind,
                rows,
                sentence,
                lambda row: ": {:.0f}x{:.0f} pixels".format(*index.boxes[row, 2:] - index.boxes[row, :2]),
            )
        )
    return found


def _shares(index: CocoDataset) -> list[Finding | None]:
    crowds, empty = np.flatnonzero(index.crowd), np.flatnonzero(index.num_objects == 0)
    return [
        annotations_finding(
            index,
            CROWDS,
            crowds if len(crowds) > _MANY_CROWDS * len(index.crowd) else crowds[:0],
            f"{len(crowds)} of {len(index.crowd)} annotations are crowds (iscrowd), which are not learnt as objects; "
            "single objects need iscrowd 0",
        ),
        images_finding(
            index,
            EMPTY,
            empty if len(empty) > _MANY_EMPTY * len(index) else empty[:0],
            f"{len(empty)} of {len(index)} images have no objects, and all in them is learnt as background; see "
            "whether annotations are missing",
        ),
    ]


def objects_per_category(index: CocoDataset) -> dict[str, int]:
    """Counts the objects of each category, crowds not counted; by name, in order of category id."""
    counts = np.bincount(index.labels[~index.crowd], minlength=index.categories.num_classes)
    return {
        name: int(counts[label]) for name, label in zip(index.categories.names, index.categories.labels, strict=True)
    }


def _categories(index: CocoDataset, evaluated: bool) -> list[Finding | None]:
    found = []
    twice = [name for name, count in Counter(index.categories.names).items() if count > 1]
    if twice:
        sentence = (
            f"{len(twice)} names are those of several categories: {_listed(twice)}; give each its own, or merge them"
        )
        found.append(Finding(SAME_NAME, False, sentence))
    counts = objects_per_category(index)
    if evaluated or not sum(counts.values()):
        return found
    unused = [name for name, count in counts.items() if not count]
    if unused:
        sentence = f"{len(unused)} of {len(counts)} categories have no objects and cannot be learnt: {_listed(unused)}"
        found.append(Finding(UNUSED_CATEGORY, False, sentence))
    most = max(counts, key=counts.get)
    few = [
        f"{name} ({count})"
        for name, count in counts.items()
        if count and (count < _FEW_OBJECTS or count < _RARE * counts[most])
    ]
    if few:
        sentence = f"{len(few)} categories have few objects, where {most} has {counts[most]}: {_listed(few)}"
        found.append(Finding(RARE_CATEGORY, False, sentence))
    return found


def _listed(names: list[str]) -> str:
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
