"""Non-maximum suppression one box at a time: N steps of N overlaps, the least work where steps are cheap."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from maskrcnn_jax.ops.boxes import exceeds_iou


def nms_one_by_one(boxes: Float[Array, "N 4"], valid: Bool[Array, " N"], *, iou_threshold: float) -> Bool[Array, " N"]:
    """Return what :func:`maskrcnn_jax.ops.nms.nms` returns."""
    position, corners = jnp.arange(boxes.shape[0]), boxes.T

    def visit(i, keep):
        suppressed = exceeds_iou(corners[:, i], corners, iou_threshold) & (position > i)
        return keep & ~(suppressed & keep[i])

    return jax.lax.fori_loop(0, boxes.shape[0], visit, valid)
