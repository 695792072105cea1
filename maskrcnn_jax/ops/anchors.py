"""Anchor boxes of the feature pyramid.

As torchvision: the shapes around the origin are rounded to integers, and the stride is the padded image size divided
by the grid size with the remainder dropped, so that P6 of an 800-pixel side (13 cells) has stride 61, not 64. As
detectron2 ("exact"): nothing is rounded and strides are powers of two.
"""

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float32

from maskrcnn_jax.anchor_shapes import cell_anchors


def grid_anchors(
    image_shape: tuple[int, ...],
    feature_shapes: Sequence[tuple[int, ...]],
    sizes: Sequence[float],
    aspect_ratios: Sequence[float],
    exact: bool = False,
    scales: Sequence[float] = (1.0,),
) -> list[Float32[Array, "_ 4"]]:
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
        rows = jnp.arange(height, dtype=jnp.float32) * _stride(image_shape[0], height, exact)
        columns = jnp.arange(width, dtype=jnp.float32) * _stride(image_shape[1], width, exact)
        y, x = jnp.meshgrid(rows, columns, indexing="ij")
        shifts = jnp.stack([x, y, x, y], axis=-1).reshape(-1, 1, 4)
        cells = cell_anchors([size * scale for scale in scales], aspect_ratios, exact)
        anchors.append((shifts + cells[None]).reshape(-1, 4))
    return anchors


def _stride(image_side: int, cells: int, exact: bool) -> int:
    return 2 ** round(math.log2(image_side / cells)) if exact else image_side // cells
