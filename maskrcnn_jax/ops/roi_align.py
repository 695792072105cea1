"""RoIAlign: pool a box of any size from a feature map to a fixed grid by bilinear interpolation, without rounding.

Each of the output_size^2 bins averages sampling_ratio^2 points, each interpolated from its four nearest cells. All
points of all RoIs are looked up in a table of feature vectors by one gather per (sample, corner), which accumulates
instead of holding all corners at once; the gradient scatters back in chunks of RoIs for the same reason.

As torchvision 0.28: there is no gradient with respect to the boxes; a point beyond [-1, size] counts as 0, one within
a cell of the border takes the border's value.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

# RoIs whose gradient is scattered at once: few enough that the updates stay in cache.
GRADIENT_CHUNK = 16


def roi_align(
    features: jax.Array,
    boxes: jax.Array,
    *,
    output_size: int,
    spatial_scale: float = 1.0,
    sampling_ratio: int = 2,
    aligned: bool = False,
) -> jax.Array:
    """Pool boxes from one feature map.

    Args:
      features: [H, W, K].
      boxes: [R, 4] in image pixels.
      output_size: side of the pooled grid.
      spatial_scale: feature cells per image pixel.
      sampling_ratio: points per bin and axis, at least 1.
      aligned: True shifts by half a cell, so that the centre of cell 0 lies at 0.5 pixels (detectron2); False is the
        original, which also treats boxes as at least one cell large (torchvision's Mask R-CNN).

    Returns:
      [R, output_size, output_size, K] in the dtype of the features.

    Source: Sec. 3, Mask R-CNN.
    """
    levels = jnp.zeros(boxes.shape[0], jnp.int32)
    return _pool([features], boxes, levels, (spatial_scale,), output_size, sampling_ratio, aligned)


def multiscale_roi_align(
    features: Sequence[jax.Array],
    boxes: jax.Array,
    *,
    image_shape: tuple[int, int],
    output_size: int,
    sampling_ratio: int = 2,
    aligned: bool = False,
) -> jax.Array:
    """Pool each box from the pyramid level that fits its size.

    Args:
      features: [H_l, W_l, K] per level, finest first.
      boxes: [R, 4] in pixels of the padded network input.
      image_shape: (H, W) of the padded network input, from which the levels' scales follow.
      output_size: side of the pooled grid.
      sampling_ratio: points per bin and axis.
      aligned: as in :func:`roi_align`.

    Returns:
      [R, output_size, output_size, K].
    """
    # Scales are powers of two even where the grid was rounded up.
    scales = tuple(2.0 ** round(math.log2(feature.shape[0] / image_shape[0])) for feature in features)
    finest, coarsest = (round(-math.log2(scale)) for scale in (scales[0], scales[-1]))
    levels = assign_levels(boxes, finest=finest, coarsest=coarsest) - finest
    return _pool(features, boxes, levels, scales, output_size, sampling_ratio, aligned)


def assign_levels(boxes: jax.Array, *, finest: int, coarsest: int) -> jax.Array:
    """Return the pyramid level [R] of boxes [R, 4]: 224^2 pixels map to level 4, twice the side to the next.

    Source: Eqn. 1, Feature Pyramid Networks; the small constant is torchvision's.
    """
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    side = jnp.sqrt(jnp.maximum(area, 0))
    level = jnp.floor(4 + jnp.log2(jnp.maximum(side, 1e-6) / 224) + 1e-6)
    return jnp.clip(level, finest, coarsest).astype(jnp.int32)


def sample_points(start: jax.Array, bin_size: jax.Array, output_size: int, sampling_ratio: int) -> jax.Array:
    """Return the coordinates [R, output_size, sampling_ratio] of the points along one axis.

    Args:
      start: [R] where the boxes begin.
      bin_size: [R] width of a bin.
      output_size: bins.
      sampling_ratio: points per bin, at the centres of its equal parts.
    """
    offset = (jnp.arange(sampling_ratio, dtype=start.dtype) + 0.5) / sampling_ratio
    position = jnp.arange(output_size, dtype=start.dtype)[:, None] + offset[None]
    return start[:, None, None] + position[None] * bin_size[:, None, None]


def interpolation_corners(points: jax.Array, size: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Return the two cells that each point lies between, and their weights.

    Args:
      points: coordinates in cells, where cell i sits at i.
      size: number of cells, broadcast against points.

    Returns:
      low, high: int32 indices; low_weight, high_weight: both 0 for points beyond [-1, size].
    """
    inside = (points >= -1) & (points <= size)
    last = (size - 1).astype(points.dtype)
    clamped = jnp.clip(points, 0, last)
    # XLA computes the points once for the indices and again for the weights, and may round the two differently. Boxes
    # of whole pixels have many points on a cell, which would then get the index of one side and the weight of the
    # other; so what lies within rounding below a cell belongs to that cell.
    rounding = 4 * jnp.finfo(points.dtype).eps * (clamped + 1)
    low = jnp.minimum(jnp.floor(clamped + rounding), last)
    fraction = jnp.maximum(clamped - low, 0)
    high_weight = jnp.where(inside, fraction, 0)
    low_weight = jnp.where(inside, 1 - fraction, 0)
    high = jnp.minimum(low + 1, last)
    return low.astype(jnp.int32), high.astype(jnp.int32), low_weight, high_weight


def _pool(features, boxes, levels, scales, output_size, sampling_ratio, aligned):
    """Gather the sample points of all boxes from the levels, laid end to end as one table."""
    heights = jnp.array([feature.shape[0] for feature in features], jnp.int32)[levels]
    widths = jnp.array([feature.shape[1] for feature in features], jnp.int32)[levels]
    starts, cells = [], 0
    for feature in features:
        starts.append(cells)
        cells += feature.shape[0] * feature.shape[1]
    starts = jnp.array(starts, jnp.int32)[levels]
    table = jnp.concatenate([feature.reshape(-1, feature.shape[-1]) for feature in features])

    scale = jnp.array(scales, boxes.dtype)[levels]
    x1, y1, x2, y2 = (boxes * scale[:, None] - (0.5 if aligned else 0.0)).T
    width, height = x2 - x1, y2 - y1
    if not aligned:
        width, height = jnp.maximum(width, 1), jnp.maximum(height, 1)
    y = sample_points(y1, height / output_size, output_size, sampling_ratio)
    x = sample_points(x1, width / output_size, output_size, sampling_ratio)
    rows = interpolation_corners(y, heights[:, None, None])
    columns = interpolation_corners(x, widths[:, None, None])
    index, weight = _table_rows(rows, columns, starts, widths, sampling_ratio)
    pooled = _weighted_rows(table, index, weight)
    return pooled.reshape(boxes.shape[0], output_size, output_size, table.shape[-1])


def _table_rows(rows, columns, starts, widths, sampling_ratio):
    """Combine both axes into table indices and weights [T, R, output_size^2], T = 4 sampling_ratio^2 terms a bin."""
    indices, weights = [], []
    for i in range(sampling_ratio):
        for j in range(sampling_ratio):
            for row, row_weight in ((rows[0], rows[2]), (rows[1], rows[3])):
                for column, column_weight in ((columns[0], columns[2]), (columns[1], columns[3])):
                    cell = row[:, :, None, i] * widths[:, None, None] + column[:, None, :, j]
                    indices.append(starts[:, None, None] + cell)
                    weights.append(row_weight[:, :, None, i] * column_weight[:, None, :, j] / sampling_ratio**2)
    num_rois, num_bins = rows[0].shape[0], rows[0].shape[1] * columns[0].shape[1]
    shape = (len(indices), num_rois, num_bins)
    return jnp.stack(indices).reshape(shape), jnp.stack(weights).reshape(shape)


@functools.partial(jax.custom_vjp)
def _weighted_rows(table, index, weight):
    """Return sum_t weight[t] * table[index[t]], [R, P, K], accumulated in float32 at least."""
    accumulate = jnp.promote_types(table.dtype, jnp.float32)
    total = jnp.zeros((*index.shape[1:], table.shape[1]), accumulate)
    for t in range(index.shape[0]):
        # Indices are clamped above, so the bounds check would only cost time.
        rows = table.at[index[t]].get(mode="promise_in_bounds")
        total = total + weight[t, ..., None].astype(accumulate) * rows.astype(accumulate)
    return total.astype(table.dtype)


def _weighted_rows_forward(table, index, weight):
    return _weighted_rows(table, index, weight), (table, index, weight)


def _weighted_rows_backward(residuals, gradient):
    table, index, weight = residuals
    accumulate = jnp.promote_types(table.dtype, jnp.float32)
    num_terms, num_rois, num_bins = index.shape
    chunk = min(GRADIENT_CHUNK, max(num_rois, 1))
    padding = -num_rois % chunk
    # Padded RoIs have weight 0 and add nothing to row 0.
    index = jnp.pad(index, ((0, 0), (0, padding), (0, 0))).reshape(num_terms, -1, chunk, num_bins)
    weight = jnp.pad(weight, ((0, 0), (0, padding), (0, 0))).reshape(index.shape)
    gradient = jnp.pad(gradient, ((0, padding), (0, 0), (0, 0))).reshape(-1, chunk, num_bins, gradient.shape[-1])

    def scatter(total, chunk_inputs):
        index, weight, gradient = chunk_inputs  # [T, chunk, P], the same, [chunk, P, K]
        updates = weight[..., None].astype(accumulate) * gradient[None].astype(accumulate)
        return total.at[index].add(updates, mode="promise_in_bounds"), None

    total, _ = jax.lax.scan(
        scatter, jnp.zeros(table.shape, accumulate), (index.swapaxes(0, 1), weight.swapaxes(0, 1), gradient)
    )
    return total.astype(table.dtype), None, jnp.zeros_like(residuals[2])


_weighted_rows.defvjp(_weighted_rows_forward, _weighted_rows_backward)
