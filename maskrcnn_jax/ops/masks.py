"""Mask targets: the part of a ground-truth mask inside an RoI, resampled to the resolution of the mask head.

torchvision resizes every mask to the network input (nearest) and then applies RoIAlign with one sample per pixel of
a bin. Both steps are separable, so here each RoI gets two small matrices, target = rows @ mask @ columns^T,
and the mask stays bit-packed, cut to its own box.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from maskrcnn_jax.ops.precision import PRECISION
from maskrcnn_jax.ops.roi_align import interpolation_corners


def unpack_mask(packed: UInt8[Array, "*shape W8"]) -> UInt8[Array, "*shape 8*W8"]:
    """Unpack [..., H, W / 8] uint8, lowest bit first, to [..., H, W] uint8 of 0 and 1."""
    shifts = jnp.arange(8, dtype=jnp.uint8).reshape((1,) * packed.ndim + (8,))
    bits = (packed[..., None] >> shifts) & 1
    return bits.reshape(*packed.shape[:-1], packed.shape[-1] * 8)


def mask_targets(
    packed: UInt8[Array, "G M M//8"],
    windows: Int[Array, "G 4"],
    raster_size: Int[Array, "2"],
    boxes: Float[Array, "F 4"],
    gt_index: Int[Array, " F"],
    image_size: Int[Array, "2"],
    *,
    max_size: tuple[int, int],
    output_size: int = 28,
    aligned: bool = False,
) -> Float[Array, "F {output_size} {output_size}"]:
    """Crop and resample the matched masks of one image.

    Args:
        packed: [G, M, M / 8] uint8 bit-packed masks, each cut to its window.
        windows: [G, 4] int32 y, x, height, width of the box of each mask on the raster; outside, the mask is zero.
        raster_size: [2] int32 (height, width) of the raster, which covers the whole image.
        boxes: [F, 4] RoIs, network-input pixels.
        gt_index: [F] int32, the mask of each RoI.
        image_size: [2] int32 (height, width) of the image inside the padded network input.
        max_size: (H, W) of the padded network input, which bounds the number of samples.
        output_size: side of the target.
        aligned: pixel i is centred at i + 0.5. torchvision's Mask R-CNN puts it at i, which shifts the targets by half
            a pixel.

    Returns:
        [F, output_size, output_size] float in 0..1: the soft targets that torchvision trains on, unless aligned. Exact
        for masks of at most M pixels a side; larger ones are sampled, see ``structures.GroundTruth``.

    Source: torchvision's project_masks_on_boxes and resize of targets; RoIAlign with sampling_ratio -1.
    """
    sizes = (packed.shape[1], output_size, aligned)

    def target(box, index):
        y, x, height, width = windows[index]
        rows = _resampling_matrix(box[1], box[3], (y, height), raster_size[0], image_size[0], max_size[0], *sizes)
        columns = _resampling_matrix(box[0], box[2], (x, width), raster_size[1], image_size[1], max_size[1], *sizes)
        mask = unpack_mask(packed[index]).astype(box.dtype)
        half = jnp.matmul(rows, mask, precision=PRECISION)
        return jnp.matmul(half, columns.T, precision=PRECISION)

    # In small groups of RoIs: the unpacked masks of all RoIs at once would take gigabytes.
    return jax.lax.map(lambda args: target(*args), (boxes, gt_index), batch_size=8)


def _resampling_matrix(start, end, window, raster_size, image_size, max_size, canvas, output_size, aligned):
    """Return [output_size, canvas]: the weights of the canvas's lines in each output line along one axis.

    A bin of width w is sampled at ceil(w) points, of the image resized to ``image_size`` by the nearest-neighbour
    rule, source = floor(destination * raster_size / image_size). ``window`` is the raster's first line on the canvas
    and the number of its lines there.
    """
    dtype = start.dtype
    length = end - start if aligned else jnp.maximum(end - start, 1)
    start = start - 0.5 if aligned else start
    bin_size = length / output_size
    max_count = -(-max_size // output_size)
    sample = jnp.arange(max_count, dtype=dtype)
    # ceil(bin_size), but exact: XLA multiplies by 1 / output_size, which takes 56 / 28 for a little more than 2.
    count = jnp.sum(sample * output_size < length).astype(dtype)
    points = (
        start
        + jnp.arange(output_size, dtype=dtype)[:, None] * bin_size
        + (sample[None, :] + 0.5) * bin_size / jnp.maximum(count, 1)
    )  # [output_size, max_count]
    low, high, low_weight, high_weight = interpolation_corners(points, image_size)
    share = jnp.where(sample < count, 1 / jnp.maximum(count, 1), 0)[None, :]
    # In float32 whatever the dtype, as torch computes it: an exact quotient would pick another line now and then.
    ratio = raster_size.astype(jnp.float32) / image_size.astype(jnp.float32)
    first, num_lines = window
    lines_a_cell = jnp.maximum(num_lines, 1).astype(jnp.float32) / jnp.clip(num_lines, 1, canvas).astype(jnp.float32)
    bins = jnp.broadcast_to(jnp.arange(output_size)[:, None], low.shape)
    matrix = jnp.zeros((output_size, canvas), dtype)
    for pixel, weight in ((low, low_weight), (high, high_weight)):
        line = jnp.minimum(jnp.floor(pixel.astype(jnp.float32) * ratio).astype(jnp.int32), raster_size - 1) - first
        cell = jnp.floor((line + 0.5) / lines_a_cell).astype(jnp.int32)
        inside = (line >= 0) & (line < num_lines)
        matrix = matrix.at[bins, jnp.where(inside, cell, 0)].add(jnp.where(inside, weight * share, 0))
    return matrix
