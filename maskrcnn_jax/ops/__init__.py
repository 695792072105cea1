"""Operations of detection as functions of arrays, usable on their own; docs/ops.md has an example of each.

All take one image, compile with ``jax.jit`` and batch with ``jax.vmap``; ``roi_align`` and ``roi_pool`` have gradients
in the features. The names here are those of the functions, also where a module of this folder is called the same.
"""

from maskrcnn_jax.ops.anchors import grid_anchors
from maskrcnn_jax.ops.boxes import (
    box_area,
    box_coverage,
    box_iou,
    clip_boxes,
    decode_boxes,
    encode_boxes,
    paired_giou,
    paired_iou,
)
from maskrcnn_jax.ops.masks import mask_targets, unpack_mask
from maskrcnn_jax.ops.matching import match, sample_balanced
from maskrcnn_jax.ops.nms import class_nms, nms
from maskrcnn_jax.ops.pyramid import assign_levels
from maskrcnn_jax.ops.roi_align import multiscale_roi_align, roi_align
from maskrcnn_jax.ops.roi_pool import multiscale_roi_pool, roi_pool

__all__ = [
    "assign_levels",
    "box_area",
    "box_coverage",
    "box_iou",
    "class_nms",
    "clip_boxes",
    "decode_boxes",
    "encode_boxes",
    "grid_anchors",
    "mask_targets",
    "match",
    "multiscale_roi_align",
    "multiscale_roi_pool",
    "nms",
    "paired_giou",
    "paired_iou",
    "roi_align",
    "roi_pool",
    "sample_balanced",
    "unpack_mask",
]
