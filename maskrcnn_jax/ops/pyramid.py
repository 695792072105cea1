"""The place of RoIs in the feature pyramid: their levels, and all levels as one table of feature vectors."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32


def assign_levels(
    boxes: Float[Array, "R 4"], *, finest: int, coarsest: int, aligned: bool = False
) -> Int32[Array, " R"]:
    """Return the pyramid level of each box: 224^2 pixels map to level 4, twice the side to the next.

    Source: Eqn. 1, Feature Pyramid Networks; the small constant is torchvision's, or detectron2's where ``aligned``.
    """
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    side = jnp.sqrt(jnp.maximum(area, 0))
    if aligned:
        level = jnp.floor(4 + jnp.log2(side / 224 + 1e-8))
    else:
        level = jnp.floor(4 + jnp.log2(jnp.maximum(side, 1e-6) / 224) + 1e-6)
    return jnp.clip(level, finest, coarsest).astype(jnp.int32)


class Placed(NamedTuple):
    """RoIs in the cells of their levels."""

    table: Float[Array, "N K"]  # the levels one after the other, row by row
    boxes: Float[Array, "R 4"]  # in cells
    starts: Int32[Array, " R"]  # row of the table at which the RoI's level begins
    heights: Int32[Array, " R"]  # of the level
    widths: Int32[Array, " R"]


def place_on_level(features: Float[Array, "H W K"], boxes: Float[Array, "R 4"], spatial_scale: float) -> Placed:
    """Place boxes in image pixels on a single level of ``spatial_scale`` cells per pixel."""
    return _place([features], boxes, jnp.zeros(boxes.shape[0], jnp.int32), (spatial_scale,))


def place_on_pyramid(
    features: Sequence[Float[Array, "_ _ K"]],
    boxes: Float[Array, "R 4"],
    *,
    image_shape: tuple[int, int],
    aligned: bool = False,
) -> Placed:
    """Place each box on the level that fits its size.

    Args:
        features: [H_l, W_l, K] per level, finest first.
        boxes: [R, 4] in pixels of the padded network input.
        image_shape: (H, W) of the padded network input, from which the levels' scales follow.
        aligned: selects the rule of :func:`assign_levels`.
    """
    # Scales are powers of two even where the grid was rounded up.
    scales = tuple(2.0 ** round(math.log2(feature.shape[0] / image_shape[0])) for feature in features)
    finest, coarsest = (round(-math.log2(scale)) for scale in (scales[0], scales[-1]))
    levels = assign_levels(boxes, finest=finest, coarsest=coarsest, aligned=aligned) - finest
    return _place(features, boxes, levels, scales)


def _place(features, boxes, levels, scales) -> Placed:
    starts, cells = [], 0
    for feature in features:
        starts.append(cells)
        cells += feature.shape[0] * feature.shape[1]
    return Placed(
        jnp.concatenate([feature.reshape(-1, feature.shape[-1]) for feature in features]),
        boxes * jnp.array(scales, boxes.dtype)[levels][:, None],
        jnp.array(starts, jnp.int32)[levels],
        jnp.array([feature.shape[0] for feature in features], jnp.int32)[levels],
        jnp.array([feature.shape[1] for feature in features], jnp.int32)[levels],
    )
