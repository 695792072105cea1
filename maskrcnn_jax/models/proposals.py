"""Select proposals from the RPN's outputs, and the RoIs for training from the proposals; for one image."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from maskrcnn_jax.ops.boxes import clip_boxes, decode_boxes, is_large
from maskrcnn_jax.ops.matching import BACKGROUND, ignore_covered, match, sample_balanced
from maskrcnn_jax.ops.nms import nms
from maskrcnn_jax.ops.precision import at_least_float32
from maskrcnn_jax.structures import GroundTruth, Proposals, RoISamples

RPN_BOX_WEIGHTS = (1.0, 1.0, 1.0, 1.0)


def select_proposals(
    objectness: Sequence[Float[Array, " _"]],
    deltas: Sequence[Float[Array, "_ 4"]],
    anchors: Sequence[Float[Array | np.ndarray, "_ 4"]],
    size: Int[Array, "2"],
    *,
    pre_nms_top_n: int,
    post_nms_top_n: int,
    nms_thresh: float,
    min_size: float,
) -> Proposals:
    """Pick the best boxes of each level, suppress duplicates within the level, and keep the best of all levels.

    Args:
        objectness: [A_l] logits per level.
        deltas: [A_l, 4] per level.
        anchors: [A_l, 4] per level.
        size: [2] (height, width) of the image inside the padding; boxes are clipped to it.
        pre_nms_top_n: candidates per level before suppression.
        post_nms_top_n: N, proposals of the image.
        nms_thresh: overlap above which the worse box goes.
        min_size: pixels; proposals with a smaller side are dropped.

    Returns:
        Proposals without batch axis: boxes [N, 4], scores [N], valid [N]. N is smaller where all levels together have
        fewer candidates.
    """
    width = min(pre_nms_top_n, max(level.shape[0] for level in objectness))
    padded_boxes, padded_scores = [], []
    for level_scores, level_deltas, level_anchors in zip(objectness, deltas, anchors, strict=True):
        count = min(width, level_scores.shape[0])
        top, index = jax.lax.top_k(level_scores, count)
        chosen = level_deltas[index].astype(at_least_float32(level_deltas.dtype))
        level_boxes = decode_boxes(chosen, jnp.asarray(level_anchors)[index], RPN_BOX_WEIGHTS)
        # Padded to one length, so that all levels are suppressed in one loop.
        padded_boxes.append(jnp.pad(level_boxes, ((0, width - count), (0, 0))))
        padded_scores.append(jnp.pad(top, (0, width - count), constant_values=-jnp.inf))
    boxes = clip_boxes(jnp.stack(padded_boxes), size)  # [L, width, 4]
    scores = jnp.stack(padded_scores)
    keep = jax.vmap(lambda b, v: nms(b, v, iou_threshold=nms_thresh))(
        boxes, jnp.isfinite(scores) & is_large(boxes, min_size)
    )
    flat_scores = jnp.where(keep, scores, -jnp.inf).reshape(-1)
    scores, index = jax.lax.top_k(flat_scores, min(post_nms_top_n, flat_scores.shape[0]))
    valid = jnp.isfinite(scores)
    return Proposals(boxes.reshape(-1, 4)[index], jnp.where(valid, scores, 0), valid)


def limit_proposals(proposals: Proposals, gt: GroundTruth, *, source: str, min_proposals: int) -> Proposals:
    """Limit the proposals of one image to those that its heads are trained on.

    Args:
        proposals: of one image, without batch axis, best first.
        gt: of one image, without batch axis.
        source: "rpn", all proposals; "gt", none; "gt_then_rpn", the best up to ``min_proposals`` boxes.
        min_proposals: with "gt_then_rpn", the smallest number of annotated boxes and proposals together.

    Returns:
        The proposals, with fewer of them valid. Source: Sec. 2.2 and 3.2 of the paper.
    """
    if source == "rpn":
        return proposals
    wanted = 0 if source == "gt" else jnp.maximum(min_proposals - jnp.sum(gt.valid), 0)
    return proposals._replace(valid=proposals.valid & (jnp.arange(proposals.valid.shape[0]) < wanted))


def sample_rois(
    key: Key[Array, ""],
    proposals: Proposals,
    gt: GroundTruth,
    *,
    size: int,
    positive_fraction: float,
    iou_thresh: float,
) -> RoISamples:
    """Sample the RoIs of one training image from its proposals and its annotated boxes.

    Args:
        key: random key.
        proposals: of one image, without batch axis.
        gt: of one image, without batch axis.
        size: R.
        positive_fraction: largest share of foreground.
        iou_thresh: overlap with an object at or above which a RoI is foreground.

    Returns:
        RoISamples without batch axis. Source: Sec. 2.3, Fast R-CNN. The annotated boxes are candidates too, so that
        there is foreground even before the RPN is trained.
    """
    boxes = jnp.concatenate([proposals.boxes, gt.boxes.astype(proposals.boxes.dtype)])
    valid = jnp.concatenate([proposals.valid, gt.valid])
    matches = match(boxes, gt.boxes, gt.valid, high_threshold=iou_thresh, low_threshold=iou_thresh)
    if gt.ignored is not None:
        matches = ignore_covered(matches, boxes, gt.boxes, gt.ignored)
    foreground, background = (matches >= 0) & valid, (matches == BACKGROUND) & valid
    sample = sample_balanced(key, foreground, background, size=size, positive_fraction=positive_fraction)
    gt_index = jnp.where(sample.foreground, matches[sample.index], 0)
    labels = jnp.where(sample.foreground, gt.labels[gt_index], 0)
    return RoISamples(boxes[sample.index], labels, gt_index, sample.valid)
