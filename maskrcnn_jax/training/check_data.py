"""The part of tools/check_dataset.py that needs no images, before a training starts."""

import numpy as np

from maskrcnn_jax.checking.annotations import Anchors, check_index, stop_or_warn
from maskrcnn_jax.data.coco import CocoDataset
from maskrcnn_jax.ops.anchors import cell_anchors
from maskrcnn_jax.options import Options


def anchors_of(options: Options) -> Anchors:
    """Return what the options say about sizes of anchors and images."""
    model, data = options.model, options.data
    sizes = np.outer(model.anchor_sizes, model.anchor_scales).ravel()
    corners = cell_anchors(tuple(sizes.tolist()), model.aspect_ratios, model.exact_anchors)
    return Anchors(
        sides=(corners[:, 2:] - corners[:, :2]).astype(np.float64),
        background_iou=model.rpn_bg_iou_thresh,
        short_side=data.short_side,
        long_side=data.long_side,
        resize=data.resize,
    )


def check_before_training(options: Options, index: CocoDataset) -> None:
    """Log what is odd in the training annotations, a line each.

    Raises:
      UserError: they are wrong in a way that the reader does not mind.
    """
    stop_or_warn(check_index(index, anchors_of(options)), options.data.train_split)
