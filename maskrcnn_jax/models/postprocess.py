"""Select the final boxes of one image from the box head's outputs."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from maskrcnn_jax.models.box_head import BOX_WEIGHTS
from maskrcnn_jax.ops.boxes import clip_boxes, decode_boxes, is_large
from maskrcnn_jax.ops.nms import Picks, class_nms
from maskrcnn_jax.options import ModelOptions
from maskrcnn_jax.structures import Proposals


def select_detections(
    class_scores: Float[Array, "N C"],
    deltas: Float[Array, "N _ 4"],
    proposals: Proposals,
    size: Int[Array | np.ndarray, "2"],
    options: ModelOptions,
) -> tuple[Float[Array, "D 4"], Float[Array, " D"], Int[Array, " D"], Bool[Array, " D"]]:
    """Decode a box for every class, suppress duplicates, keep the best.

    Args:
        class_scores: [N, C] probabilities, without background.
        deltas: [N, C + 1, 4], or [N, 1, 4] for all classes.
        proposals: without batch axis.
        size: [2] (height, width) of the image inside the padding.
        options: of the network; those that begin with ``box_``.

    Returns:
        boxes [D, 4], scores [D], labels [D] and valid [D], best first.
    """
    deltas = deltas[:, 1:] if deltas.shape[1] > 1 else deltas
    boxes = clip_boxes(decode_boxes(deltas, proposals.boxes[:, None], BOX_WEIGHTS), size)
    boxes = jnp.broadcast_to(boxes, (*class_scores.shape, 4))  # [N, C, 4]
    scores = jnp.where(proposals.valid[:, None] & is_large(boxes, options.box_min_size), class_scores, 0)
    picks = suppress_detections(boxes, scores, options)
    return boxes[picks.box_index, picks.class_index], picks.scores, picks.class_index + 1, picks.valid


def suppress_detections(boxes: Float[Array, "N C 4"], scores: Float[Array, "N C"], options: ModelOptions) -> Picks:
    """Suppress the boxes [N, C, 4] of an image by the options of the network and return the best."""
    return class_nms(
        boxes,
        scores,
        iou_threshold=options.box_nms_thresh,
        score_threshold=options.box_score_thresh,
        max_picks=options.box_detections_per_img,
        method=options.box_nms_method,
        sigma=options.box_nms_sigma,
        class_agnostic=options.box_nms_class_agnostic,
    )
