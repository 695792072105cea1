"""RoIPool: pool a box to a fixed grid by the maximum of each bin, after rounding the box and the bins to whole cells.

RoIAlign replaced it; it is here for comparison. The number of cells per bin varies from RoI to RoI, so all bins visit
their cells one by one, for as many steps as the largest bin has cells.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from maskrcnn_jax.ops.pyramid import Placed, place_on_level, place_on_pyramid

# A box counts as at most this many times as long as the longest level, so that the limits of its bins fit a table.
MAX_MAP_LENGTHS = 2


def roi_pool(
    features: Float[Array, "H W K"], boxes: Float[Array, "R 4"], *, output_size: int, spatial_scale: float = 1.0
) -> Float[Array, "R {output_size} {output_size} K"]:
    """Pool boxes from one feature map.

    Args:
        features: [H, W, K].
        boxes: [R, 4] in image pixels; those longer than MAX_MAP_LENGTHS times the map are cut to that length.
        output_size: side of the pooled grid.
        spatial_scale: feature cells per image pixel.

    Returns:
        [R, output_size, output_size, K] in the dtype of the features; 0 in bins that lie beyond the map.

    Source: Sec. 2.1, Fast R-CNN; rounding as torchvision's roi_pool.
    """
    return _pool(place_on_level(features, boxes, spatial_scale), output_size, max(features.shape[:2]))


def multiscale_roi_pool(
    features: Sequence[Float[Array, "_ _ K"]],
    boxes: Float[Array, "R 4"],
    *,
    image_shape: tuple[int, int],
    output_size: int,
) -> Float[Array, "R {output_size} {output_size} K"]:
    """Pool each box from the pyramid level that fits its size.

    Args:
        features: [H_l, W_l, K] per level, finest first.
        boxes: [R, 4] in pixels of the padded network input.
        image_shape: (H, W) of the padded network input, from which the levels' scales follow.
        output_size: side of the pooled grid.

    Returns:
        [R, output_size, output_size, K].
    """
    placed = place_on_pyramid(features, boxes, image_shape=image_shape)
    return _pool(placed, output_size, max(side for feature in features for side in feature.shape[:2]))


def _pool(placed: Placed, output_size: int, longest: int) -> Float[Array, "R {output_size} {output_size} K"]:
    corners = _round_half_away(placed.boxes)
    # Of a box of n cells, where each bin begins and ends.
    limits = _bin_limits(MAX_MAP_LENGTHS * longest, output_size, placed.boxes.dtype)

    def edges(start, stop, size):
        length = jnp.clip(stop - start + 1, 1, len(limits[0]) - 1)
        low, high = (jnp.asarray(table)[length] + start[:, None] for table in limits)
        return jnp.clip(low, 0, size[:, None]), jnp.clip(high, 0, size[:, None])  # [R, output_size]

    x1, y1, x2, y2 = corners.T
    top, bottom = edges(y1, y2, placed.heights)
    left, right = edges(x1, x2, placed.widths)
    first = placed.starts[:, None, None] + top[:, :, None] * placed.widths[:, None, None] + left[:, None, :]
    height = jnp.broadcast_to((bottom - top)[:, :, None], first.shape)
    width = jnp.broadcast_to((right - left)[:, None, :], first.shape)
    stride = jnp.broadcast_to(placed.widths[:, None, None], first.shape)
    pooled = _largest(placed.table, *(array.reshape(-1) for array in (first, height, width, stride)))
    return pooled.reshape(*first.shape, placed.table.shape[1])


def _round_half_away(x: Float[Array, "*shape"]) -> Int32[Array, "*shape"]:
    """Round to the nearest integer, halves away from zero, as C does."""
    whole = jnp.floor(jnp.abs(x))
    return (jnp.sign(x) * (whole + (jnp.abs(x) - whole >= 0.5))).astype(jnp.int32)


def _bin_limits(max_length: int, output_size: int, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Return where the bins of boxes of 0..max_length cells begin and end, [max_length + 1, output_size] int32.

    In numpy and in the dtype of the boxes, in the order of torchvision's operations: 7 * (n / 7) may round to more
    than n, and a bin then reaches a cell further.
    """
    bin_size = (np.arange(max_length + 1).astype(dtype) / np.asarray(output_size, dtype))[:, None]
    bins = np.arange(output_size).astype(dtype)
    return np.floor(bins * bin_size).astype(np.int32), np.ceil((bins + 1) * bin_size).astype(np.int32)


@functools.partial(jax.custom_vjp)
def _largest(table, first, height, width, stride):
    """Return the largest of the cells [P, K] of each bin [P], channel by channel; 0 for bins without cells."""
    return _find_largest(table, first, height, width, stride)[0]


def _find_largest(table, first, height, width, stride):
    """As :func:`_largest`, with the rows of the table [P, K] where they are; one beyond the last for none."""
    count = height * width

    def visit(i, state):
        best, where = state
        y, x = jnp.divmod(i, jnp.maximum(width, 1))
        row = jnp.where(i < count, first + y * stride + x, 0)
        cells = table.at[row].get(mode="promise_in_bounds")
        better = (i < count)[:, None] & (cells > best)  # the first of equals stays
        return jnp.where(better, cells, best), jnp.where(better, row[:, None], where)

    shape = (len(first), table.shape[1])
    nothing = jnp.full(shape, -jnp.inf, table.dtype), jnp.full(shape, len(table), jnp.int32)
    best, where = jax.lax.fori_loop(0, jnp.max(count, initial=0), visit, nothing)
    return jnp.where(where < len(table), best, 0), where


def _largest_forward(table, first, height, width, stride):
    pooled, where = _find_largest(table, first, height, width, stride)
    return pooled, (jnp.zeros_like(table), where)


def _largest_backward(residuals, gradient):
    zeros, where = residuals
    channels = jnp.arange(zeros.shape[1])
    return zeros.at[where, channels].add(gradient, mode="drop"), None, None, None, None


_largest.defvjp(_largest_forward, _largest_backward)
