"""Assign ground truth to anchors or proposals, and draw a balanced sample of them; for one image."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, Key

from maskrcnn_jax.ops.boxes import box_coverage, box_iou

BACKGROUND = -1
IGNORED = -2
# Objects that are compared with all boxes at once; the overlaps of all objects would take too much memory.
_BLOCK = 16


def match(
    boxes: Float[Array, "N 4"],
    gt_boxes: Float[Array, "G 4"],
    gt_valid: Bool[Array, " G"],
    *,
    high_threshold: float,
    low_threshold: float,
    allow_low_quality: bool = False,
) -> Int32[Array, " N"]:
    """Match each box to the ground-truth object that it overlaps most.

    Args:
        boxes: [N, 4] anchors or proposals.
        gt_boxes: [G, 4].
        gt_valid: [G] bool.
        high_threshold: overlap at or above which a box is foreground.
        low_threshold: overlap below which it is background; between the two it is ignored.
        allow_low_quality: also match the boxes that overlap an object best of all boxes (ties included), however
            little, with the object that they themselves overlap most.

    Returns:
        [N] int32: index of the object, BACKGROUND or IGNORED. Without valid objects all are BACKGROUND.

    Source: Sec. 3.1.2, Faster R-CNN. Exactly as torchvision's Matcher, including that an object which overlaps no
    box at all is overlapped equally well, by 0, by every box, and so makes every box foreground. Objects without area,
    which torchvision refuses, are left out for this reason.
    """
    if gt_boxes.shape[0] == 0 or boxes.shape[0] == 0:
        return jnp.full(boxes.shape[0], BACKGROUND, jnp.int32)
    gt_valid = gt_valid & jnp.all(gt_boxes[:, 2:] > gt_boxes[:, :2], axis=1)
    size = min(_BLOCK, gt_boxes.shape[0])
    padding = -gt_boxes.shape[0] % size

    def visit(best, block):
        best_iou, best_gt, is_best = best
        first, gt_boxes, gt_valid = block
        iou = jnp.where(gt_valid[:, None], box_iou(gt_boxes, boxes), -1)  # [size, N]
        highest = jnp.max(iou, axis=0)
        # Of equal overlaps, the one with the earlier object wins.
        best_gt = jnp.where(highest > best_iou, first + jnp.argmax(iou, axis=0), best_gt).astype(jnp.int32)
        best_of_gt = (iou == jnp.max(iou, axis=1, keepdims=True)) & gt_valid[:, None]
        return (jnp.maximum(best_iou, highest), best_gt, is_best | jnp.any(best_of_gt, axis=0)), None

    number = boxes.shape[0]
    dtype = jnp.result_type(boxes, gt_boxes)
    start = jnp.full(number, -2, dtype), jnp.zeros(number, jnp.int32), jnp.zeros(number, bool)
    blocks = (
        jnp.arange(0, gt_boxes.shape[0], size),
        jnp.pad(gt_boxes, ((0, padding), (0, 0))).reshape(-1, size, 4),
        jnp.pad(gt_valid, (0, padding)).reshape(-1, size),
    )
    (best_iou, best_gt, is_best), _ = jax.lax.scan(visit, start, blocks)
    matches = jnp.where(best_iou >= high_threshold, best_gt, jnp.where(best_iou < low_threshold, BACKGROUND, IGNORED))
    return jnp.where(is_best, best_gt, matches) if allow_low_quality else matches


def ignore_covered(
    matches: Int32[Array, " N"],
    boxes: Float[Array, "N 4"],
    regions: Float[Array, "G 4"],
    valid: Bool[Array, " G"],
    *,
    threshold: float = 0.5,
) -> Int32[Array, " N"]:
    """Ignore background boxes inside regions that may hold unannotated objects.

    Args:
        matches: [N] int32, as :func:`match` returns them.
        boxes: [N, 4] anchors or proposals.
        regions: [G, 4] boxes around crowds, or around objects of categories that are left out.
        valid: [G] bool.
        threshold: share of a box inside one region at or above which it is ignored.

    Returns:
        [N] int32: matches with IGNORED in place of some BACKGROUND; foreground is unchanged.
    """
    covered = jnp.any((box_coverage(boxes, regions) >= threshold) & valid[None, :], axis=1)
    return jnp.where((matches == BACKGROUND) & covered, IGNORED, matches)


class Sample(NamedTuple):
    """Indices drawn by :func:`sample_balanced`, foreground first."""

    index: Int32[Array, "*B S"]  # type: ignore[assignment]  # into the candidates; hides tuple.index
    foreground: Bool[Array, "*B S"]
    valid: Bool[Array, "*B S"]  # False where there were too few candidates


def sample_balanced(
    key: Key[Array, ""],
    foreground: Bool[Array, " N"],
    background: Bool[Array, " N"],
    *,
    size: int,
    positive_fraction: float,
) -> Sample:
    """Draw ``size`` candidates uniformly, at most ``positive_fraction`` of them foreground, the rest background.

    Args:
        key: random key.
        foreground: [N] bool, disjoint from background.
        background: [N] bool.
        size: S; fewer are valid when there are not enough candidates.
        positive_fraction: largest share of foreground; background fills the rest.

    Returns:
        The drawn indices: foreground ones, then background ones, then invalid ones.
    """
    # A share of the requested size, also where there are fewer candidates, as in torchvision.
    max_foreground = int(size * positive_fraction)
    size = min(size, foreground.shape[0])
    max_foreground = min(max_foreground, size)
    priority = jax.random.uniform(key, foreground.shape)
    _, foreground_index = jax.lax.top_k(jnp.where(foreground, priority, -1), max_foreground)
    _, background_index = jax.lax.top_k(jnp.where(background, priority, -1), size)
    num_foreground = jnp.minimum(jnp.sum(foreground), max_foreground)
    num_background = jnp.minimum(jnp.sum(background), size - num_foreground)
    slot = jnp.arange(size)
    in_foreground = slot < num_foreground
    padded_foreground = jnp.pad(foreground_index, (0, size - max_foreground))
    index = jnp.where(in_foreground, padded_foreground, background_index[jnp.maximum(slot - num_foreground, 0)])
    return Sample(index.astype(jnp.int32), in_foreground, slot < num_foreground + num_background)
