"""What an exported file says about itself: how images are prepared and what comes out."""

from collections.abc import Sequence

import numpy as np

from maskrcnn_jax.data.transforms import RESIZE
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.inference.predictor import Predictor


def check_sizes(sizes: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Return padded sizes (height, width), each once, smallest area first.

    Raises:
        UserError: unless all are multiples of 32.
    """
    wrong = [size for size in sizes if len(size) != 2 or min(size) < 32 or any(side % 32 for side in size)]
    if wrong:
        raise UserError(f"images padded to {'x'.join(map(str, wrong[0]))} do not fit the model; use multiples of 32")
    return sorted({tuple(size) for size in sizes}, key=lambda size: (size[0] * size[1], size))


def describe(predictor: Predictor, sizes: Sequence[tuple[int, ...]]) -> dict:
    """Return all that a program that runs an exported model has to know, for JSON."""
    data, model, categories = predictor.options.data, predictor.options.model, predictor.categories
    rows = zip(categories.labels, categories.ids, categories.names, strict=True)
    return {
        "sizes": [list(size) for size in sizes],  # of the padded images, (height, width), smallest first
        "channels": model.in_channels,
        "dtype": np.dtype(RESIZE[data.resize]).name,  # of the images
        "resize": data.resize,  # uint8 and float32: OpenCV's bilinear resizing in this dtype; pillow: Pillow's
        "short_side": data.short_side,  # what the shorter side is resized to,
        "long_side": data.long_side,  # unless the longer one would be more than this
        "aligned_masks": model.roi_aligned,  # whether masks are pasted as in detectron2, not as in torchvision
        "num_classes": categories.num_classes,  # background included
        "categories": [{"label": int(label), "id": int(i), "name": name} for label, i, name in rows],
    }
