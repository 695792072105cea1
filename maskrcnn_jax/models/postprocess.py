"""Select the final boxes of one image from the box head's outputs."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from maskrcnn_jax.models.box_head import BOX_WEIGHTS
from maskrcnn_jax.ops.boxes import clip_boxes, decode_boxes, is_large
from maskrcnn_jax.ops.nms import class_nms
from maskrcnn_jax.structures import Proposals


def select_detections(
    class_scores: Float[Array, "N C"],
    deltas: Float[Array, "N _ 4"],
    proposals: Proposals,
    size: Int[Array | np.ndarray, "2"],
    *,
    score_thresh: float,
    nms_thresh: float,
    min_size: float,
    detections_per_img: int,
    nms_method: str = "hard",
    nms_sigma: float = 0.5,
    nms_class_agnostic: bool = False,
) -> tuple[Float[Array, "D 4"], Float[Array, " D"], Int[Array, " D"], Bool[Array, " D"]]:
    """Decode a box for every class, suppress duplicates within each class, keep the best.

    Args:
        class_scores: [N, C] probabilities, without background.
        deltas: [N, C + 1, 4], or [N, 1, 4] for all classes.
        proposals: without batch axis.
        size: [2] (height, width) of the image inside the padding.
        score_thresh: probability at or below which nothing is detected.
        nms_thresh: overlap above which the worse box goes.
        min_size: pixels; boxes with a smaller side are dropped.
        detections_per_img: D.
        nms_method: hard, linear or gaussian, as in ``class_nms``.
        nms_sigma: of gaussian.
        nms_class_agnostic: suppress duplicates among all classes.

    Returns:
        boxes [D, 4], scores [D], labels [D] and valid [D], best first.
    """
    deltas = deltas[:, 1:] if deltas.shape[1] > 1 else deltas
    boxes = clip_boxes(decode_boxes(deltas, proposals.boxes[:, None], BOX_WEIGHTS), size)
    boxes = jnp.broadcast_to(boxes, (*class_scores.shape, 4))  # [N, C, 4]
    scores = jnp.where(proposals.valid[:, None] & is_large(boxes, min_size), class_scores, 0)
    picks = class_nms(
        boxes,
        scores,
        iou_threshold=nms_thresh,
        score_threshold=score_thresh,
        max_picks=detections_per_img,
        method=nms_method,
        sigma=nms_sigma,
        class_agnostic=nms_class_agnostic,
    )
    return boxes[picks.box_index, picks.class_index], picks.scores, picks.class_index + 1, picks.valid
