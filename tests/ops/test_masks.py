"""Mask targets against hand-computed values and the two separate steps they combine."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskrcnn_jax.ops.masks import mask_targets, unpack_mask

compiled_targets = jax.jit(mask_targets, static_argnames=("max_size", "output_size"))


def pack(masks):
    """Pack [G, M, M] of 0 and 1 along the width, lowest bit first."""
    return jnp.asarray(np.packbits(np.asarray(masks, np.uint8), axis=-1, bitorder="little"))


def whole(mask_size, number=1):
    """Return the windows of masks that fill the raster."""
    return jnp.tile(jnp.array([0, 0, *mask_size], jnp.int32), (number, 1))


def targets(masks, boxes, index, mask_size, image_size, output_size=4, max_size=(64, 64)):
    return compiled_targets(
        pack(masks),
        whole(mask_size, len(masks)),
        jnp.asarray(mask_size, jnp.int32),
        jnp.asarray(boxes, jnp.float32),
        jnp.asarray(index, jnp.int32),
        jnp.asarray(image_size, jnp.int32),
        max_size=max_size,
        output_size=output_size,
    )


def blob(seed=0, side=32):
    return np.random.default_rng(seed).random((2, side, side)) > 0.5


def test_unpacking_inverts_packing_with_the_lowest_bit_first():
    np.testing.assert_array_equal(unpack_mask(jnp.array([[1, 128]], jnp.uint8)), [[1] + [0] * 14 + [1]])
    masks = blob()
    np.testing.assert_array_equal(unpack_mask(pack(masks)), masks)


def test_the_target_of_a_full_mask_is_one_and_of_an_empty_one_zero():
    masks = np.stack([np.ones((32, 32)), np.zeros((32, 32))])
    result = targets(masks, [[2, 3, 20, 25], [2, 3, 20, 25]], [0, 1], (32, 32), (32, 32))
    np.testing.assert_allclose(result[0], 1, rtol=1e-6)
    np.testing.assert_array_equal(result[1], 0)


def test_the_target_of_a_half_filled_box_is_its_left_half():
    mask = np.zeros((1, 32, 32))
    mask[0, :, :8] = 1
    result = targets(mask, [[0, 0, 16, 16]], [0], (32, 32), (32, 32), output_size=4)
    # Bins of 4 pixels with samples at 0.5, 1.5, 2.5, 3.5: the sample at 7.5 lies half way between mask and background.
    np.testing.assert_allclose(result[0], [[1, 0.875, 0, 0]] * 4, rtol=1e-6)


def test_the_index_chooses_the_mask():
    masks = np.stack([np.zeros((32, 32)), np.ones((32, 32))])
    result = targets(masks, [[0, 0, 8, 8]] * 3, [1, 0, 1], (32, 32), (32, 32))
    np.testing.assert_allclose(result[:, 0, 0], [1, 0, 1])


def test_a_raster_of_twice_the_resolution_gives_the_target_of_every_second_line():
    """Nearest-neighbour resizing by a half keeps lines 0, 2, 4, ..."""
    masks = blob()
    boxes = [[1.5, 2, 14, 13], [0, 0, 16, 16]]
    halved = np.zeros_like(masks)
    halved[:, :16, :16] = masks[:, ::2, ::2]
    result = targets(masks, boxes, [0, 1], (32, 32), (16, 16))
    np.testing.assert_allclose(result, targets(halved, boxes, [0, 1], (16, 16), (16, 16)), atol=1e-6)


def test_what_lies_on_the_canvas_beyond_the_raster_changes_nothing():
    masks = blob()
    filled = masks.copy()
    filled[:, 20:], filled[:, :, 24:] = 1, 1
    boxes = [[0, 0, 48, 40], [10, 10, 48, 40]]  # reach the border of the image
    expected = targets(masks, boxes, [0, 1], (20, 24), (40, 48))
    np.testing.assert_array_equal(targets(filled, boxes, [0, 1], (20, 24), (40, 48)), expected)
    larger = np.zeros((2, 64, 64), bool)
    larger[:, :32, :32] = filled
    np.testing.assert_allclose(targets(larger, boxes, [0, 1], (20, 24), (40, 48)), expected, atol=1e-6)


def test_a_larger_padded_canvas_changes_no_target():
    masks, boxes = blob(), [[0, 0, 31, 29], [3.3, 4.4, 20, 9]]
    small = targets(masks, boxes, [0, 1], (32, 32), (32, 32), max_size=(32, 32))
    large = targets(masks, boxes, [0, 1], (32, 32), (32, 32), max_size=(256, 128))
    np.testing.assert_allclose(small, large, atol=1e-6)


def test_flipping_mask_and_box_flips_the_target():
    """The sampling of cell i at i + 0.5 is not symmetric, but the mirror of x = 31 - x is."""
    mask = blob()[:1]
    box = np.array([[4.0, 6.0, 20.0, 22.0]])
    mirrored = np.array([[31 - 20.0, 6.0, 31 - 4.0, 22.0]])
    expected = targets(mask, box, [0], (32, 32), (32, 32))[:, :, ::-1]
    np.testing.assert_allclose(targets(mask[:, :, ::-1], mirrored, [0], (32, 32), (32, 32)), expected, atol=1e-6)


def test_degenerate_boxes_and_empty_images_give_finite_targets():
    boxes = [[5, 5, 5, 5], [0, 0, 0, 0], [32, 32, 32, 32], [20, 20, 3, 3], [-50, -50, -10, -10]]
    result = targets(blob(), boxes, [0] * 5, (32, 32), (32, 32))
    assert bool(jnp.all((result >= 0) & (result <= 1)))
    np.testing.assert_array_equal(result[4], 0)
    empty = targets(blob(), boxes, [0] * 5, (0, 0), (0, 0))
    assert bool(jnp.all(jnp.isfinite(empty)))


def exact_matrix(start, end, size, output_size):
    """Return [output_size, size], the weight of every line in every bin, from distances instead of indices."""
    length = max(end - start, 1)
    count = -(-length // output_size)
    points = start + (np.arange(output_size)[:, None] + (np.arange(count) + 0.5) / count) * length / output_size
    points = np.clip(points, 0, size - 1)[..., None]
    return np.maximum(0, 1 - np.abs(points - np.arange(size))).mean(axis=1)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_compiled_targets_of_boxes_of_whole_pixels_are_exact(dtype):
    """Many of their points lie on a cell, where the index and the weights must agree on which side it is."""
    rng = np.random.default_rng(0)
    masks = rng.random((1, 256, 256)) > 0.5
    start = rng.integers(0, 100, (300, 2)) * (rng.random((300, 1)) > 0.5)
    end = np.minimum(start + rng.integers(1, 200, (300, 2)), 256)
    start[:9], end[:9] = 0, 28 * np.arange(1, 10)[:, None]
    boxes = np.concatenate([start, end], axis=-1)
    with jax.enable_x64(dtype == "float64"):
        result = compiled_targets(
            pack(masks),
            whole((256, 256)),
            jnp.array([256, 256]),
            jnp.asarray(boxes, dtype),
            jnp.zeros(300, jnp.int32),
            jnp.array([256, 256]),
            max_size=(256, 256),
            output_size=28,
        )
    for target, (x1, y1, x2, y2) in zip(np.asarray(result), boxes, strict=True):
        expected = exact_matrix(y1, y2, 256, 28) @ masks[0] @ exact_matrix(x1, x2, 256, 28).T
        # Coordinates up to 256 in float32 are off by a few 1e-5.
        np.testing.assert_allclose(target, expected, atol=2e-4 if dtype == "float32" else 1e-11)


def test_no_rois_give_no_targets():
    assert targets(blob(), np.zeros((0, 4)), np.zeros(0), (32, 32), (32, 32)).shape == (0, 4, 4)


def test_additional_boxes_and_masks_change_no_target():
    masks, boxes = blob(), [[0, 0, 31, 29], [3.3, 4.4, 20, 9]]
    expected = targets(masks, boxes, [0, 1], (32, 32), (32, 32))
    padded = targets(
        np.concatenate([masks, np.ones((9, 32, 32))]),
        boxes + [[1e9, 0, -1e9, 7]] * 7,
        [0, 1] + [5] * 7,
        (32, 32),
        (32, 32),
    )
    np.testing.assert_allclose(padded[:2], expected, atol=1e-6)


@pytest.mark.slow
def test_mask_targets_compiled_equal_eager_and_vmap_equals_a_loop():
    masks = np.stack([blob(0), blob(1)])
    boxes = jnp.array([[[1.0, 2.0, 20.0, 30.0]], [[0.0, 0.0, 5.0, 31.0]]])
    index, sizes = jnp.array([[0], [1]]), jnp.array([[32, 32], [24, 30]])

    def function(packed, boxes, index, size):
        windows = jnp.tile(jnp.array([0, 0, 32, 32]), (2, 1))
        return mask_targets(packed, windows, size, boxes, index, size, max_size=(32, 32), output_size=4)

    arguments = (jnp.stack([pack(m) for m in masks]), boxes, index, sizes)
    compiled = jax.jit(function)
    loop = jnp.stack([compiled(*row) for row in zip(*arguments, strict=True)])
    np.testing.assert_allclose(loop[0], function(*(a[0] for a in arguments)), atol=1e-6)
    np.testing.assert_allclose(jax.vmap(function)(*arguments), loop, atol=1e-6)


def test_aligned_targets_of_a_box_of_28_pixels_are_the_pixels_themselves():
    mask = np.random.default_rng(0).integers(0, 2, (1, 48, 48)).astype(np.uint8)
    packed = jnp.asarray(np.packbits(mask, axis=-1, bitorder="little"))
    size = jnp.array([48, 48])
    target = mask_targets(
        packed,
        whole((48, 48)),
        size,
        jnp.array([[7.0, 3.0, 35.0, 31.0]]),
        jnp.zeros(1, jnp.int32),
        size,
        max_size=(64, 64),
        aligned=True,
    )
    np.testing.assert_allclose(target[0], mask[0, 3:31, 7:35], atol=1e-5)
