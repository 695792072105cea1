"""Anchor boxes of the feature pyramid, computed with numpy while the model is traced.

As torchvision: the shapes around the origin are rounded to integers, and the stride is the padded image size divided
by the grid size with the remainder dropped, so that P6 of an 800-pixel side (13 cells) has stride 61, not 64.
"""

import numpy as np


def cell_anchors(size: float, aspect_ratios: tuple[float, ...]) -> np.ndarray:
    """Return anchors [len(aspect_ratios), 4] of area size^2 centred at the origin, rounded to integers.

    Args:
      size: square root of the area, pixels.
      aspect_ratios: height / width.

    Example: size 32, ratio 0.5 has sides 45.25 x 22.63 and gives [-23, -11, 23, 11].
    """
    # torch rounds halves to even, as numpy does; float32 because a half must fall the same way.
    ratios = np.sqrt(np.asarray(aspect_ratios, np.float32))
    half = np.stack([np.float32(size) / ratios, np.float32(size) * ratios], axis=-1) / 2  # (width, height)
    return np.round(np.concatenate([-half, half], axis=-1)).astype(np.float32)


def grid_anchors(
    image_shape: tuple[int, int],
    feature_shapes: list[tuple[int, int]],
    sizes: tuple[float, ...],
    aspect_ratios: tuple[float, ...],
) -> list[np.ndarray]:
    """Place the cell anchors at every cell of every level.

    Args:
      image_shape: (H, W) of the padded network input.
      feature_shapes: (H_l, W_l) per level.
      sizes: anchor size per level.
      aspect_ratios: shared by all levels.

    Returns:
      Per level [H_l * W_l * len(aspect_ratios), 4] float32, ordered by row, column, aspect ratio: the order in which
      the RPN's outputs flatten.
    """
    anchors = []
    for (height, width), size in zip(feature_shapes, sizes, strict=True):
        y = np.arange(height, dtype=np.float32) * (image_shape[0] // height)
        x = np.arange(width, dtype=np.float32) * (image_shape[1] // width)
        y, x = np.meshgrid(y, x, indexing="ij")
        shifts = np.stack([x, y, x, y], axis=-1).reshape(-1, 1, 4)
        anchors.append((shifts + cell_anchors(size, aspect_ratios)).reshape(-1, 4))
    return anchors
