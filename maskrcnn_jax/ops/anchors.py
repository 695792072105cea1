"""Anchor boxes of the feature pyramid, computed with numpy while the model is traced.

As torchvision: the shapes around the origin are rounded to integers, and the stride is the padded image size divided
by the grid size with the remainder dropped, so that P6 of an 800-pixel side (13 cells) has stride 61, not 64. As
detectron2 ("exact"): nothing is rounded and strides are powers of two.
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32


def cell_anchors(
    sizes: Sequence[float], aspect_ratios: Sequence[float], exact: bool = False
) -> Float32[np.ndarray, "A 4"]:
    """Return anchors [len(aspect_ratios) * len(sizes), 4] of areas size^2 centred at the origin.

    Args:
        sizes: square roots of the areas, pixels.
        aspect_ratios: height / width.
        exact: do not round, and order by size, then ratio, as in detectron2; otherwise round to integers and order by
            ratio, then size, as in torchvision.

    Example: size 32, ratio 0.5 has sides 45.25 x 22.63 and gives [-23, -11, 23, 11].
    """
    # torch rounds halves to even, as numpy does; torchvision in float32, and a half must fall the same way.
    dtype = np.float64 if exact else np.float32
    ratios, sides = np.sqrt(np.asarray(aspect_ratios, dtype))[:, None], np.asarray(sizes, dtype)
    half = np.stack([sides / ratios, sides * ratios], axis=-1) / 2  # [ratio, size, (width, height)]
    half = (half.swapaxes(0, 1) if exact else half).reshape(-1, 2)
    corners = np.concatenate([-half, half], axis=-1)
    return (corners if exact else np.round(corners)).astype(np.float32)


def grid_anchors(
    image_shape: tuple[int, int],
    feature_shapes: Sequence[tuple[int, int]],
    sizes: Sequence[float],
    aspect_ratios: Sequence[float],
    exact: bool = False,
    scales: Sequence[float] = (1.0,),
) -> list[Float32[np.ndarray, "_ 4"]]:
    """Place the cell anchors at every cell of every level.

    Args:
        image_shape: (H, W) of the padded network input.
        feature_shapes: (H_l, W_l) per level.
        sizes: anchor size per level.
        aspect_ratios: shared by all levels.
        exact: detectron2's rules instead of torchvision's.
        scales: every level has anchors of its size times each of these.

    Returns:
        Per level [H_l * W_l * len(aspect_ratios) * len(scales), 4] float32, ordered by row, column, and then as
        :func:`cell_anchors` orders them: the order in which the RPN's outputs flatten.
    """
    anchors = []
    for (height, width), size in zip(feature_shapes, sizes, strict=True):
        rows = np.arange(height, dtype=np.float32) * _stride(image_shape[0], height, exact)
        columns = np.arange(width, dtype=np.float32) * _stride(image_shape[1], width, exact)
        y, x = np.meshgrid(rows, columns, indexing="ij")
        shifts = np.stack([x, y, x, y], axis=-1).reshape(-1, 1, 4)
        anchors.append(
            (shifts + cell_anchors([size * scale for scale in scales], aspect_ratios, exact)).reshape(-1, 4)
        )
    return anchors


def _stride(image_side: int, cells: int, exact: bool) -> int:
    return 2 ** round(math.log2(image_side / cells)) if exact else image_side // cells
