"""RoIAlign: pool a box of any size from a feature map to a fixed grid by bilinear interpolation, without rounding.

Each of the output_size^2 bins averages sampling_ratio^2 points, each interpolated from its four nearest cells. All
points are looked up in a table of feature vectors by one gather per (sample, corner), which accumulates instead of
holding all corners at once; the gradient scatters back. Both take one image after another, in chunks of RoIs.

Adaptive sampling (sampling_ratio 0, detectron2) takes about one point per cell instead, so the number of points varies
from RoI to RoI. Shapes cannot vary, so RoIs with similar numbers are processed together, for as many steps as the
largest of them needs.

As in torchvision 0.28, there is no gradient with respect to the boxes; a point beyond [-1, size] counts as 0, and one
within a cell of the border takes the border's value. Unlike there, MAX_MAP_LENGTHS limits adaptive sampling.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap
from jaxtyping import Array, Float, Int, Int32

from maskrcnn_jax.ops.precision import at_least_float32
from maskrcnn_jax.ops.pyramid import Placed, place_on_level, place_on_pyramid

# Bins that are pooled at once. Their rows of the table fit into the cache of a CPU and the memory on a TPU's chip.
CHUNK_BINS = 16 * 49
# RoIs that share a number of steps in adaptive sampling, few enough to need similar numbers.
CHUNK = 16
# Adaptive sampling takes no more points than a box of this many times the size of the feature map needs. This bounds
# the time whatever the boxes are.
MAX_MAP_LENGTHS = 2


def roi_align(
    features: Float[Array, "H W K"],
    boxes: Float[Array, "R 4"],
    *,
    output_size: int,
    spatial_scale: float = 1.0,
    sampling_ratio: int = 2,
    aligned: bool = False,
) -> Float[Array, "R {output_size} {output_size} K"]:
    """Pool boxes from one feature map.

    Args:
        features: [H, W, K].
        boxes: [R, 4] in image pixels.
        output_size: side of the pooled grid.
        spatial_scale: feature cells per image pixel.
        sampling_ratio: points per bin and axis; 0 is adaptive, ceil(side / output_size) of a box with this side in
            cells, and 0 as result where that is 0.
        aligned: True shifts by half a cell, so that the centre of cell 0 lies at 0.5 pixels (detectron2); False is the
            original, which also treats boxes as at least one cell large (torchvision's Mask R-CNN).

    Returns:
        [R, output_size, output_size, K] in the dtype of the features.

    Source: Sec. 3, Mask R-CNN.
    """
    placed, (height, width) = place_on_level(features, boxes, spatial_scale), features.shape[:2]
    return _pool(placed, (height, width), output_size, sampling_ratio, aligned)


def multiscale_roi_align(
    features: Sequence[Float[Array, "_ _ K"]],
    boxes: Float[Array, "R 4"],
    *,
    image_shape: tuple[int, int],
    output_size: int,
    sampling_ratio: int = 2,
    aligned: bool = False,
) -> Float[Array, "R {output_size} {output_size} K"]:
    """Pool each box from the pyramid level that fits its size.

    Args:
        features: [H_l, W_l, K] per level, finest first.
        boxes: [R, 4] in pixels of the padded network input.
        image_shape: (H, W) of the padded network input, from which the levels' scales follow.
        output_size: side of the pooled grid.
        sampling_ratio: points per bin and axis, 0 for adaptive sampling, as in :func:`roi_align`.
        aligned: as in :func:`roi_align`; also selects the rule of :func:`.pyramid.assign_levels`.

    Returns:
        [R, output_size, output_size, K].
    """
    placed = place_on_pyramid(features, boxes, image_shape=image_shape, aligned=aligned)
    largest = max(feature.shape[0] for feature in features), max(feature.shape[1] for feature in features)
    return _pool(placed, largest, output_size, sampling_ratio, aligned)


def sample_points(
    start: Float[Array, " R"], bin_size: Float[Array, " R"], output_size: int, sampling_ratio: int
) -> Float[Array, "R {output_size} {sampling_ratio}"]:
    """Return the coordinates of the sample points along one axis.

    Args:
        start: [R] where the boxes begin.
        bin_size: [R] width of a bin.
        output_size: bins.
        sampling_ratio: points per bin, at the centres of its equal parts.
    """
    # In the order of torchvision's additions: another order rounds differently and changes the samples by 1e-5.
    start, bin_size = start[:, None, None], bin_size[:, None, None]
    bins = jnp.arange(output_size, dtype=start.dtype).reshape(1, -1, 1)
    samples = jnp.arange(sampling_ratio, dtype=start.dtype).reshape(1, 1, -1) + 0.5
    return start + bins * bin_size + samples * bin_size / sampling_ratio


def interpolation_corners(
    points: Float[Array, "*shape"], size: Int[Array, "*#shape"]
) -> tuple[Int32[Array, "*shape"], Int32[Array, "*shape"], Float[Array, "*shape"], Float[Array, "*shape"]]:
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
    # of whole pixels have many points exactly on a cell, which could get the index of one side and the weight of the
    # other. So a point within rounding below a cell belongs to that cell.
    rounding = 4 * jnp.finfo(points.dtype).eps * (clamped + 1)
    low = jnp.minimum(jnp.floor(clamped + rounding), last)
    fraction = jnp.maximum(clamped - low, 0)
    high_weight = jnp.where(inside, fraction, 0)
    low_weight = jnp.where(inside, 1 - fraction, 0)
    high = jnp.minimum(low + 1, last)
    return low.astype(jnp.int32), high.astype(jnp.int32), low_weight, high_weight


def _pool(
    placed: Placed, largest: tuple[int, int], output_size: int, sampling_ratio: int, aligned: bool
) -> Float[Array, "R {output_size} {output_size} K"]:
    """Gather the sample points of all boxes from the table; ``largest`` is the (height, width) of the finest level."""
    table, boxes, starts, heights, widths = placed
    x1, y1, x2, y2 = (boxes - (0.5 if aligned else 0.0)).T
    width, height = x2 - x1, y2 - y1
    if not aligned:
        width, height = jnp.maximum(width, 1), jnp.maximum(height, 1)
    if sampling_ratio == 0:
        rois = _RoIs(
            *(starts, heights, widths, y1, x1, height / output_size, width / output_size),
            num_y=_sample_counts(height, heights, largest[0], output_size),
            num_x=_sample_counts(width, widths, largest[1], output_size),
        )
        pooled = _adaptive_samples(table, rois, output_size)
    else:
        y = sample_points(y1, height / output_size, output_size, sampling_ratio)
        x = sample_points(x1, width / output_size, output_size, sampling_ratio)
        rows = interpolation_corners(y, heights[:, None, None])
        columns = interpolation_corners(x, widths[:, None, None])
        index, weight = _table_rows(rows, columns, starts, widths, sampling_ratio)
        pooled = _weighted_rows(table, index, weight, len(table))
    return pooled.reshape(boxes.shape[0], output_size, output_size, table.shape[-1])


def _table_rows(rows, columns, starts, widths, sampling_ratio):
    """Combine both axes into table indices and weights [T, R, output_size^2], T = 4 sampling_ratio^2 terms a bin."""

    # Axes: sample and neighbour of y and x, RoI, bin of y and x. Those that an array does not depend on are 1.
    def along_y(low, high):
        return jnp.expand_dims(jnp.stack([low, high]).transpose(3, 0, 1, 2), (1, 3, 6))

    def along_x(low, high):
        return jnp.expand_dims(jnp.stack([low, high]).transpose(3, 0, 1, 2), (0, 2, 5))

    def of_roi(array):
        return jnp.expand_dims(array, (0, 1, 2, 3, 5, 6))

    index = of_roi(starts) + along_y(rows[0], rows[1]) * of_roi(widths) + along_x(columns[0], columns[1])
    weight = along_y(rows[2], rows[3]) * along_x(columns[2], columns[3]) / sampling_ratio**2
    shape = (4 * sampling_ratio**2, len(starts), rows[0].shape[1] * columns[0].shape[1])
    return index.reshape(shape), weight.reshape(shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _weighted_rows(table, index, weight, num_rows):
    """Return sum_t weight[t] * table[index[t]], [R, P, K], accumulated in float32 at least."""
    return sequential_vmap(_gather_rows)(table, index, weight)


def _weighted_rows_forward(table, index, weight, num_rows):
    return _weighted_rows(table, index, weight, num_rows), (index, weight)  # the gradient needs no table


def _weighted_rows_backward(num_rows, residuals, gradient):
    index, weight = residuals
    scatter = sequential_vmap(functools.partial(_scatter_gradient, num_rows=num_rows))
    return scatter(index, weight, gradient).astype(gradient.dtype), None, jnp.zeros_like(weight)


_weighted_rows.defvjp(_weighted_rows_forward, _weighted_rows_backward)


def _gather_rows(table, index, weight):
    def gather(_, chunk):
        total = jnp.zeros((*chunk[0].shape[1:], table.shape[1]), at_least_float32(table.dtype))
        return None, _add_rows(total, table, *chunk).astype(table.dtype)

    size = _chunk_size(index)
    _, pooled = jax.lax.scan(gather, None, (_chunks(index, 1, size), _chunks(weight, 1, size)))
    return pooled.reshape(-1, *pooled.shape[2:])[: index.shape[1]]


def _scatter_gradient(index, weight, gradient, num_rows):
    """Return the gradient of :func:`_gather_rows` with respect to the table, [N, K], in float32 or wider."""

    def scatter(total, chunk):
        return _scatter_rows(total, *chunk), None

    size = _chunk_size(index)
    chunks = _chunks(index, 1, size), _chunks(weight, 1, size), _chunks(gradient, 0, size)
    total = jnp.zeros((num_rows, gradient.shape[-1]), at_least_float32(gradient.dtype))
    return jax.lax.scan(scatter, total, chunks)[0]


def _chunk_size(index):
    """Return how many RoIs are pooled at once, whose indices are [T, R, P]: fewer where they have more bins."""
    _, num_rois, num_bins = index.shape
    return max(min(CHUNK_BINS // num_bins, num_rois), 1)


def _chunks(array, axis, size):
    """Cut the RoIs along an axis: [..., R, ...] to [R / size, ..., size, ...], zero where no RoI is left."""
    array = jnp.moveaxis(array, axis, 0)
    array = jnp.pad(array, ((0, -len(array) % size), *((0, 0),) * (array.ndim - 1)))
    return jnp.moveaxis(array.reshape(-1, size, *array.shape[1:]), 1, axis + 1)


def _add_rows(total, table, index, weight):
    """Add sum_t weight[t] * table[index[t]] to total [R, P, K]; index, weight: [T, R, P]."""
    for t in range(index.shape[0]):
        # Indices are clamped above, so the bounds check would only cost time.
        rows = table.at[index[t]].get(mode="promise_in_bounds")
        total = total + weight[t, ..., None].astype(total.dtype) * rows.astype(total.dtype)
    return total


def _scatter_rows(total, index, weight, gradient):
    """Add weight * gradient [R, P, K] to the rows of total, the transpose of :func:`_add_rows`."""
    # RoIs and bins become one axis before the product; on TPUs, joining them afterwards would be a copy.
    gradient = gradient.reshape(-1, gradient.shape[-1]).astype(total.dtype)
    updates = weight.reshape(len(weight), -1, 1).astype(total.dtype) * gradient[None]
    return total.at[index.reshape(len(index), -1)].add(updates, mode="promise_in_bounds")


class _RoIs(NamedTuple):
    """What adaptive sampling needs of each RoI, arrays [R]; lengths in cells of its level."""

    start: jax.Array  # row of the table at which the level begins
    height: jax.Array  # of the level
    width: jax.Array
    y: jax.Array
    x: jax.Array
    bin_height: jax.Array
    bin_width: jax.Array
    num_y: jax.Array  # points per bin
    num_x: jax.Array


def _sample_counts(length, map_length, max_map_length, output_size):
    """Return ceil(length / output_size) [R] int32, the points of a bin along one axis, within the limit."""
    length = jnp.minimum(length, MAX_MAP_LENGTHS * map_length)
    sample = jnp.arange(-(-MAX_MAP_LENGTHS * max_map_length // output_size), dtype=length.dtype)
    # Exact: XLA multiplies by 1 / output_size, which takes 56 / 28 for a little more than 2.
    return jnp.sum(sample[None] * output_size < length[:, None], axis=1, dtype=jnp.int32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _adaptive_samples(table, rois, output_size):
    """Return the mean over the samples of each bin, [R, output_size^2, K]."""
    return sequential_vmap(functools.partial(_average_samples, output_size=output_size))(table, rois)


def _adaptive_samples_forward(table, rois, output_size):
    return _adaptive_samples(table, rois, output_size), (table, rois)


def _adaptive_samples_backward(output_size, residuals, gradient):
    table, rois = residuals
    scatter = functools.partial(_scatter_samples, num_rows=table.shape[0], output_size=output_size)
    return sequential_vmap(scatter)(gradient, rois).astype(table.dtype), None


_adaptive_samples.defvjp(_adaptive_samples_forward, _adaptive_samples_backward)


def _average_samples(table, rois, output_size):
    """Average the samples of RoIs [R] from a table [N, K], to [R, output_size^2, K]."""
    order, chunks, num_steps = _chunks_of_similar_counts(rois)

    def average(_, inputs):
        chunk, num_steps = inputs

        def add_sample(sample, total):
            return _add_rows(total, table, *_sample_rows(chunk, sample, output_size))

        total = jnp.zeros((len(chunk.x), output_size**2, table.shape[-1]), at_least_float32(table.dtype))
        return None, jax.lax.fori_loop(0, num_steps, add_sample, total).astype(table.dtype)

    _, pooled = jax.lax.scan(average, None, (chunks, num_steps))
    empty = jnp.zeros((len(rois.x), *pooled.shape[2:]), pooled.dtype)
    return empty.at[order].set(pooled, mode="drop")


def _scatter_samples(gradient, rois, num_rows, output_size):
    """Return the gradient of :func:`_average_samples` with respect to the table, [N, K], in float32 or wider."""
    order, chunks, num_steps = _chunks_of_similar_counts(rois)

    def scatter(total, inputs):
        chunk, num_steps, gradient = inputs

        def add_sample(sample, total):
            index, weight = _sample_rows(chunk, sample, output_size)
            return _scatter_rows(total, index, weight, gradient)

        return jax.lax.fori_loop(0, num_steps, add_sample, total), None

    total = jnp.zeros((num_rows, gradient.shape[-1]), at_least_float32(gradient.dtype))
    return jax.lax.scan(scatter, total, (chunks, num_steps, _cut(gradient, order)))[0]


def _chunks_of_similar_counts(rois):
    """Sort the RoIs [R] of an image by their number of samples, the most first, and cut them into chunks.

    Returns:
        The order [R / CHUNK, CHUNK], R where no RoI is left; the chunks [R / CHUNK, CHUNK]; and the number of samples
        [R / CHUNK] of the largest RoI of each.
    """
    num_rois = len(rois.x)
    chunk = min(CHUNK, max(num_rois, 1))
    order = jnp.argsort(-rois.num_y * rois.num_x)
    order = jnp.pad(order, (0, -num_rois % chunk), constant_values=num_rois).reshape(-1, chunk)
    chunks = _RoIs(*(_cut(leaf, order) for leaf in rois))
    return order, chunks, jnp.max(chunks.num_y * chunks.num_x, axis=1)


def _cut(leaf, order):
    """Arrange [R, ...] as [R / CHUNK, CHUNK, ...], zero where no RoI is left."""
    return leaf.at[order].get(mode="fill", fill_value=0)


def _sample_rows(rois, sample, output_size):
    """Return table rows and weights [4, R, output_size^2] of one sample in all bins of RoIs [R]."""
    count = rois.num_y * rois.num_x
    i, j = jnp.divmod(sample, jnp.maximum(rois.num_x, 1))
    weight = jnp.where(sample < count, 1 / jnp.maximum(count, 1).astype(rois.x.dtype), 0)

    def corners(start, bin_size, number, sample, size):
        bins = jnp.arange(output_size, dtype=start.dtype)[None]
        offset = (sample.astype(start.dtype) + 0.5) * bin_size / jnp.maximum(number, 1).astype(start.dtype)
        # In the order of torchvision's additions, as in sample_points.
        points = start[:, None] + bins * bin_size[:, None] + offset[:, None]
        # Where no RoI is left the size is 0, and there must be a cell 0 to look up.
        return [c[..., None] for c in interpolation_corners(points, jnp.maximum(size, 1)[:, None])]

    rows = corners(rois.y, rois.bin_height, rois.num_y, i, rois.height)
    columns = corners(rois.x, rois.bin_width, rois.num_x, j, rois.width)
    index, corner_weight = _table_rows(rows, columns, rois.start, rois.width, sampling_ratio=1)
    return index, corner_weight * weight[None, :, None]
