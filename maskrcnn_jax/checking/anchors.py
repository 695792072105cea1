"""Objects that no anchor of the model can match."""

from dataclasses import dataclass

import numpy as np

from maskrcnn_jax.anchor_shapes import cell_anchors
from maskrcnn_jax.checking.examples import annotations_finding
from maskrcnn_jax.data.coco import CocoDataset
from maskrcnn_jax.data.findings import Finding, Kind
from maskrcnn_jax.data.transforms import resized_sizes
from maskrcnn_jax.options import Options

_MANY = 0.01  # share of the objects; every dataset has a few


@dataclass(frozen=True)
class Anchors:
    """The options that decide whether an object can be matched to anchors."""

    sides: np.ndarray  # [A, 2] float (width, height) of the anchors at one place of every level, pixels
    background_iou: float  # below, an anchor is background
    short_side: int  # images are resized so, see transforms.resized_sizes
    long_side: int
    resize: str

    @classmethod
    def from_options(cls, options: Options) -> "Anchors":
        """Return the anchors of a model, and how its images are resized."""
        model, data = options.model, options.data
        sizes = np.outer(model.anchor_sizes, model.anchor_scales).ravel()
        corners = cell_anchors(tuple(sizes.tolist()), model.aspect_ratios, model.exact_anchors)
        return cls(
            sides=(corners[:, 2:] - corners[:, :2]).astype(np.float64),
            background_iou=model.rpn_bg_iou_thresh,
            short_side=data.short_side,
            long_side=data.long_side,
            resize=data.resize,
        )


def best_overlaps(index: CocoDataset, anchors: Anchors) -> np.ndarray:
    """Return the largest IoU of each object with an anchor that is placed as well as possible; [K] float.

    An anchor of sides a, b overlaps a box of sides w, h by at most o / (w h + a b - o), o = min(w, a) min(h, b).
    """
    width, height = _resized_sides(index, anchors).T
    best = np.zeros(len(width))
    for a, b in anchors.sides:
        shared = np.minimum(width, a) * np.minimum(height, b)
        best = np.maximum(best, shared / (width * height + a * b - shared))
    return best


def check_anchors(index: CocoDataset, anchors: Anchors) -> list[Finding]:
    """Return findings of objects that are too small, too large or too thin, if they are many."""
    unmatched = (best_overlaps(index, anchors) < anchors.background_iou) & ~index.crowd
    areas = anchors.sides.prod(axis=1)
    small = unmatched & (_resized_sides(index, anchors).prod(axis=1) < areas.min())
    total = int(np.count_nonzero(~index.crowd))
    sides = dict.fromkeys([anchors.short_side, anchors.long_side])
    found = []
    for kind, chosen, anchor in (
        (Kind.SMALL, small, anchors.sides[areas.argmin()]),
        (Kind.LARGE, unmatched & ~small, anchors.sides[areas.argmax()]),
    ):
        rows = np.flatnonzero(chosen)
        if len(rows) >= _MANY * total:
            found += annotations_finding(
                index,
                kind,
                rows,
                lambda row: ": {:.0f}x{:.0f} pixels".format(*index.boxes[row, 2:] - index.boxes[row, :2]),
                total=total,
                side="..".join(map(str, sides)),
                iou=anchors.background_iou,
                anchor="{:.0f}x{:.0f}".format(*anchor),
            )
    return found


def _resized_sides(index: CocoDataset, anchors: Anchors) -> np.ndarray:
    """Return the [K, 2] (width, height) of the boxes in the resized images."""
    sizes = resized_sizes(index.sizes, anchors.short_side, anchors.long_side, anchors.resize)
    scale = (sizes / index.sizes)[index.image_rows, ::-1]
    return (index.boxes[:, 2:] - index.boxes[:, :2]) * scale
