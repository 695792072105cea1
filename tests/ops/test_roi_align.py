"""RoIAlign against hand-computed values, its symmetries, and a plain loop over sample points."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from maskrcnn_jax import ops
from maskrcnn_jax.distributed import make_mesh, on_each_device, split
from maskrcnn_jax.ops.pyramid import assign_levels

# Compiled as a whole: op by op, most of the time would go into compiling single operations.
roi_align = jax.jit(ops.roi_align, static_argnames=("output_size", "spatial_scale", "sampling_ratio", "aligned"))
multiscale_roi_align = jax.jit(
    ops.multiscale_roi_align, static_argnames=("image_shape", "output_size", "sampling_ratio", "aligned")
)


def ramp(height, width):
    """Return [H, W, 2] whose channels are the y and x of the cell: bilinear interpolation returns the point itself."""
    return jnp.stack(jnp.meshgrid(jnp.arange(float(height)), jnp.arange(float(width)), indexing="ij"), axis=-1)


def loop_roi_align(features, boxes, output_size, scale, sampling_ratio, aligned):
    """Pool sample by sample, in float64."""
    height, width, channels = features.shape

    def interpolate(y, x):
        if y < -1 or y > height or x < -1 or x > width:
            return np.zeros(channels)
        y, x = np.clip(y, 0, height - 1), np.clip(x, 0, width - 1)
        y0, x0 = int(y), int(x)
        y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
        top = features[y0, x0] * (1 - (x - x0)) + features[y0, x1] * (x - x0)
        bottom = features[y1, x0] * (1 - (x - x0)) + features[y1, x1] * (x - x0)
        return top * (1 - (y - y0)) + bottom * (y - y0)

    pooled = np.zeros((len(boxes), output_size, output_size, channels))
    for r, box in enumerate(boxes):
        x1, y1, x2, y2 = box * scale - (0.5 if aligned else 0)
        w, h = x2 - x1, y2 - y1
        if not aligned:
            w, h = max(w, 1), max(h, 1)
        num_y, num_x = (sampling_ratio or max(math.ceil(side / output_size), 0) for side in (h, w))
        for i, j in np.ndindex(output_size, output_size):
            for a, b in np.ndindex(num_y, num_x):
                y = y1 + (i + (a + 0.5) / num_y) * h / output_size
                x = x1 + (j + (b + 0.5) / num_x) * w / output_size
                pooled[r, i, j] += interpolate(y, x) / (num_y * num_x)
    return pooled


def random_pyramid(batch, num_rois, channels=3):
    """Return features [B, H_l, W_l, K] of 192 x 256 pixels, boxes [B, R, 4] of all sizes, and a cotangent."""
    rng = np.random.default_rng(0)
    features = [rng.normal(size=(batch, 192 >> level, 256 >> level, channels)) for level in (2, 3)]
    corner = rng.uniform(-30, 200, (batch, num_rois, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(-2, 240, (batch, num_rois, 2))], axis=-1)
    cotangent = rng.normal(size=(batch, num_rois, 3, 3, channels))
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (features, boxes, cotangent))


def adaptive(features, boxes):
    """Pool the boxes of one image as detectron2 does."""
    return ops.multiscale_roi_align(
        features, boxes, image_shape=(192, 256), output_size=3, sampling_ratio=0, aligned=True
    )


def pull_back(features, boxes, cotangent):
    """Return the pooled boxes of one image and the gradient of <pooled, cotangent>."""
    pooled, transpose = jax.vjp(lambda features: adaptive(features, boxes), features)
    return pooled, transpose(cotangent)[0]


def batched_loss(features, boxes, cotangent):
    return jnp.vdot(jax.vmap(adaptive)(features, boxes), cotangent)


def test_bins_of_a_ramp_are_their_centres():
    """A box from 2 to 6 has bins 2..4 and 4..6: centres 3 and 5, where cell i sits at i."""
    pooled = roi_align(ramp(10, 12), jnp.array([[2.0, 4.0, 6.0, 8.0]]), output_size=2)
    np.testing.assert_allclose(pooled[0, :, :, 0], [[5, 5], [7, 7]], rtol=1e-6)
    np.testing.assert_allclose(pooled[0, :, :, 1], [[3, 5], [3, 5]], rtol=1e-6)


def test_aligned_pooling_reads_half_a_cell_earlier():
    pooled = roi_align(ramp(10, 12), jnp.array([[2.0, 4.0, 6.0, 8.0]]), output_size=2, aligned=True)
    np.testing.assert_allclose(pooled[0, :, :, 0], [[4.5, 4.5], [6.5, 6.5]], rtol=1e-6)
    np.testing.assert_allclose(pooled[0, :, :, 1], [[2.5, 4.5], [2.5, 4.5]], rtol=1e-6)


def test_the_scale_maps_image_pixels_to_cells():
    pooled = roi_align(ramp(10, 12), jnp.array([[8.0, 16.0, 24.0, 32.0]]), output_size=2, spatial_scale=0.25)
    np.testing.assert_allclose(pooled[0, :, :, 0], [[5, 5], [7, 7]], rtol=1e-6)


def test_a_box_without_area_is_widened_to_a_cell_unless_aligned():
    box = jnp.array([[3.0, 3.0, 3.0, 3.0]])
    original = roi_align(ramp(8, 8), box, output_size=1)
    np.testing.assert_allclose(original[0, 0, 0], [3.5, 3.5], rtol=1e-6)
    np.testing.assert_allclose(roi_align(ramp(8, 8), box, output_size=1, aligned=True)[0, 0, 0], [2.5, 2.5], rtol=1e-6)


def test_samples_within_a_cell_of_the_border_take_its_value_and_those_beyond_count_as_zero():
    ones = jnp.ones((4, 4, 1))
    # One bin with two samples an axis, at 1/4 and 3/4 of the box.
    boxes = jnp.array(
        [
            [-1.0, 0.0, 1.0, 1.0],  # x at -0.5 and 0.5: both count
            [-3.0, 0.0, 1.0, 1.0],  # x at -2 and 0: half is lost
            [3.0, 0.0, 5.0, 1.0],  # x at 3.5 and 4.5: the cells end at 3, 4 is the limit
            [4.0, 4.0, 4.0, 4.0],  # at the far corner: widened to 4..5, samples 4.25 and 4.75
            [-9.0, -9.0, -5.0, -5.0],  # outside
        ]
    )
    pooled = roi_align(ones, boxes, output_size=1)[:, 0, 0, 0]
    np.testing.assert_allclose(pooled, [1, 0.5, 0.5, 0, 0], rtol=1e-6)


def test_adaptive_sampling_takes_a_point_for_every_cell_that_a_bin_begins():
    """Between cells x^2 is interpolated linearly, so that the mean of a bin tells how many points were taken.

    The row of cells is 0, 1, 4, 9, 16, 25; aligned, a box from 0.5 to 4.5 begins at cell 0.
    """
    squares = jnp.tile(jnp.arange(6.0)[None, :, None] ** 2, (4, 1, 1))
    boxes = jnp.array(
        [
            [0.5, 1.0, 4.5, 3.0],  # bins of 2 cells, 2 points: 0.5, 1.5 and 2.5, 3.5
            [0.5, 1.0, 2.5, 3.0],  # bins of 1 cell, 1 point: 0.5 and 1.5
            [0.5, 1.0, 5.0, 3.0],  # bins of 2.25 cells, 3 points: 0.375, 1.125, 1.875 and 2.625, 3.375, 4.125
            [1.5, 1.0, 1.5, 3.0],  # no width, no points
            [3.5, 1.0, 1.5, 3.0],  # turned over
        ]
    )
    pooled = roi_align(squares, boxes, output_size=2, sampling_ratio=0, aligned=True)[..., 0]
    means = [[1.5, 9.5], [0.5, 2.5], [(0.375 + 1.375 + 3.625) / 3, (7.125 + 11.625 + 17.125) / 3], [0, 0], [0, 0]]
    np.testing.assert_allclose(pooled, np.repeat(np.array(means)[:, None], 2, axis=1), rtol=1e-6)


def test_adaptive_sampling_takes_its_own_number_of_points_along_each_axis():
    """A bin of 1 x 3 cells: one point along y, three along x; 1, 2, 3 would give the same mean on a ramp, not here."""
    cells = jnp.arange(5.0)
    features = ((cells[:, None] == 1) * (cells[None] ** 2))[..., None]
    box = jnp.array([[0.5, 1.0, 3.5, 2.0]])  # y at 1.0, x at 0.5, 1.5, 2.5
    pooled = roi_align(features, box, output_size=1, sampling_ratio=0, aligned=True)
    np.testing.assert_allclose(pooled[0, 0, 0, 0], (0.5 + 2.5 + 6.5) / 3, rtol=1e-6)
    transposed = roi_align(
        features.swapaxes(0, 1), box[:, [1, 0, 3, 2]], output_size=1, sampling_ratio=0, aligned=True
    )
    np.testing.assert_allclose(transposed, pooled, rtol=1e-6)


def test_a_box_without_area_has_one_adaptive_sample_unless_aligned():
    """Widened to a cell, from 3 to 4, its only point lies at 3.5."""
    pooled = roi_align(ramp(8, 8), jnp.array([[3.0, 3.0, 3.0, 3.0]]), output_size=1, sampling_ratio=0)
    np.testing.assert_allclose(pooled[0, 0, 0], [3.5, 3.5], rtol=1e-6)


@pytest.mark.parametrize("output_size", [7, 14])
def test_the_number_of_adaptive_samples_is_exact_where_bins_are_whole_cells(output_size):
    """A quotient a little above 2 would be rounded up to 3."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(2, 150, 1)).astype(np.float32)
    sides = output_size * np.arange(1, 140 // output_size + 1)
    boxes = np.array([[4, 0, 4 + side, 1] for side in sides], np.float32)
    pooled = roi_align(jnp.asarray(features), jnp.asarray(boxes), output_size=output_size, sampling_ratio=0)
    expected = loop_roi_align(features, boxes, output_size, 1, 0, aligned=False)
    np.testing.assert_allclose(pooled, expected, atol=1e-4)  # coordinates up to 150 in float32: 1e-5 times the slope


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("sampling_ratio", [1, 2, 3, 0])
def test_pooling_equals_the_loop_over_points(aligned, sampling_ratio):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(9, 11, 3)).astype(np.float32)
    corner = rng.uniform(-6, 40, (12, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(-1, 20, (12, 2))], axis=-1).astype(np.float32)
    options = {"output_size": 3, "sampling_ratio": sampling_ratio, "aligned": aligned}
    pooled = roi_align(jnp.asarray(features), jnp.asarray(boxes), spatial_scale=0.25, **options)
    expected = loop_roi_align(features, boxes, 3, 0.25, sampling_ratio, aligned)
    # Coordinates up to 15 cells in float32 are off by 1e-6, times slopes of about 3.
    np.testing.assert_allclose(pooled, expected, atol=1e-5)


def test_shifting_image_and_boxes_by_whole_cells_changes_nothing(key):
    features = jax.random.normal(key, (16, 16, 2))
    boxes = jnp.array([[4.0, 5.0, 9.0, 11.5], [6.25, 3.0, 8.0, 4.0]])
    shifted = jnp.roll(features, (2, 3), axis=(0, 1))
    expected = roi_align(features, boxes, output_size=3)
    pooled = roi_align(shifted, boxes + jnp.array([[3.0, 2.0, 3.0, 2.0]]), output_size=3)
    np.testing.assert_allclose(pooled, expected, atol=1e-5)


def test_flipping_image_and_boxes_flips_the_pooled_bins(key):
    """Aligned only: there cell i covers i..i+1, so that the mirror of x is W - x."""
    features = jax.random.normal(key, (12, 16, 2))
    boxes = jnp.array([[2.0, 1.0, 9.0, 11.0], [5.5, 3.0, 14.0, 4.0]])
    mirrored = jnp.stack([16 - boxes[:, 2], boxes[:, 1], 16 - boxes[:, 0], boxes[:, 3]], axis=-1)
    expected = roi_align(features, boxes, output_size=4, aligned=True)[:, :, ::-1]
    pooled = roi_align(features[:, ::-1], mirrored, output_size=4, aligned=True)
    np.testing.assert_allclose(pooled, expected, atol=1e-5)


def test_levels_follow_the_size_of_the_box():
    sides = jnp.array([0.0, 1.0, 111.9, 112.0, 223.9, 224.0, 448.0, 5000.0])
    boxes = jnp.stack([jnp.zeros(8), jnp.zeros(8), sides, sides], axis=-1)
    for aligned in (False, True):
        levels = assign_levels(boxes, finest=2, coarsest=5, aligned=aligned)
        np.testing.assert_array_equal(levels, [2, 2, 2, 3, 3, 4, 5, 5])


def test_only_torchvision_counts_a_side_just_below_224_to_the_next_level():
    """log2(223.9999 / 224) is -6.4e-7: torchvision adds 1e-6, detectron2 has 1e-8 inside the logarithm."""
    box = jnp.array([[0.0, 0.0, 223.9999, 223.9999]])
    assert assign_levels(box, finest=2, coarsest=5).tolist() == [4]
    assert assign_levels(box, finest=2, coarsest=5, aligned=True).tolist() == [3]


def test_every_box_is_pooled_from_its_own_level():
    features = [jnp.full((128 // 2**i, 128 // 2**i, 1), float(i)) for i in range(4)]
    sides = jnp.array([30.0, 120.0, 230.0, 460.0])
    boxes = jnp.stack([sides * 0, sides * 0, sides, sides], axis=-1)
    pooled = multiscale_roi_align(features, boxes, image_shape=(512, 512), output_size=2)
    np.testing.assert_allclose(pooled[:, 0, 0, 0], [0, 1, 2, 3])


def test_a_level_whose_grid_was_rounded_up_still_has_a_scale_that_is_a_power_of_two():
    """A side of 100 gives grids of 25, 13, 7 and 4."""
    features = [ramp(size, size) for size in (25, 13, 7, 4)]
    boxes = jnp.array([[20.0, 20.0, 60.0, 60.0]])
    pooled = multiscale_roi_align(features, boxes, image_shape=(100, 100), output_size=1)
    np.testing.assert_allclose(pooled[0, 0, 0], [10, 10], rtol=1e-6)


@pytest.mark.parametrize("sampling_ratio", [2, 0])
@pytest.mark.parametrize("num_rois", [0, 1, 40])
def test_the_chunked_gradient_equals_that_of_the_plain_sum(num_rois, sampling_ratio):
    """Pooling is linear in the features, so the gradient is the transpose: <g, pool(f)> = <pool^T(g), f>."""
    rng = np.random.default_rng(num_rois)
    features = jnp.asarray(rng.normal(size=(8, 8, 3)).astype(np.float32))
    corner = rng.uniform(-4, 28, (num_rois, 2))
    boxes = jnp.asarray(np.concatenate([corner, corner + rng.uniform(0, 20, (num_rois, 2))], axis=-1), jnp.float32)
    cotangent = jnp.asarray(rng.normal(size=(num_rois, 2, 2, 3)).astype(np.float32))

    def pool(features):
        return roi_align(features, boxes, output_size=2, spatial_scale=0.25, sampling_ratio=sampling_ratio)

    def pull_back(features):
        pooled, transpose = jax.vjp(pool, features)
        return pooled, transpose(cotangent)[0]

    pooled, gradient = jax.jit(pull_back)(features)
    direction = jnp.asarray(rng.normal(size=(8, 8, 3)).astype(np.float32))
    assert gradient.shape == features.shape
    assert bool(jnp.all(jnp.isfinite(gradient)))
    np.testing.assert_allclose(jnp.vdot(gradient, direction), jnp.vdot(cotangent, pool(direction)), atol=2e-4)
    np.testing.assert_allclose(jnp.vdot(gradient, features), jnp.vdot(cotangent, pooled), atol=2e-4)


@pytest.mark.parametrize("aligned", [False, True])
def test_the_adaptive_gradient_equals_finite_differences(aligned):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        corner = rng.uniform(-2, 7, (20, 2))
        boxes = jnp.asarray(np.concatenate([corner, corner + rng.uniform(0, 9, (20, 2))], axis=-1))
        features = jnp.asarray(rng.normal(size=(7, 8, 2)))
        pool = jax.jit(lambda f: roi_align(f, boxes, output_size=2, sampling_ratio=0, aligned=aligned))
        # Pooling is linear: only rounding, of about 1e-16 / 1e-6, separates the two.
        check_grads(pool, (features,), order=1, modes=["rev"], atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("sampling_ratio", [2, 0])
def test_no_gradient_flows_to_the_boxes(key, sampling_ratio):
    features = jax.random.normal(key, (8, 8, 2))
    gradient = jax.jit(
        jax.grad(lambda boxes: roi_align(features, boxes, output_size=2, sampling_ratio=sampling_ratio).sum())
    )
    gradient = gradient(jnp.array([[1.0, 1.0, 5.0, 6.0]]))
    np.testing.assert_array_equal(gradient, jnp.zeros((1, 4)))


@pytest.mark.parametrize("sampling_ratio", [2, 0])
def test_no_boxes_pool_to_nothing(sampling_ratio):
    pooled = roi_align(jnp.ones((4, 4, 3)), jnp.zeros((0, 4)), output_size=2, sampling_ratio=sampling_ratio)
    assert pooled.shape == (0, 2, 2, 3)


@pytest.mark.parametrize("sampling_ratio", [2, 0])
def test_additional_boxes_change_nothing_whatever_they_hold(key, sampling_ratio):
    features = jax.random.normal(key, (8, 8, 2))
    boxes = jnp.array([[1.0, 1.0, 5.0, 6.0], [0.0, 0.0, 3.0, 1.0]])
    garbage = jnp.array(
        [
            [jnp.nan] * 4,
            [1e30] * 4,
            [-1e30, -1e30, 1e30, 1e30],
            [-jnp.inf, 0.0, jnp.inf, 1.0],
            [0.0, 0.0, jnp.inf, jnp.inf],
            [9.0, 9.0, -9.0, -9.0],
        ]
    )

    @jax.jit
    def pool_and_pull_back(boxes):
        pooled, transpose = jax.vjp(
            lambda f: roi_align(f, boxes, output_size=2, sampling_ratio=sampling_ratio, aligned=True), features
        )
        return pooled, transpose(jnp.zeros_like(pooled).at[:2].set(1))[0]

    pooled, gradient = pool_and_pull_back(jnp.concatenate([boxes, garbage]))
    expected, expected_gradient = pool_and_pull_back(boxes)
    assert bool(jnp.all(jnp.isfinite(pooled)))
    np.testing.assert_array_equal(pooled[:2], expected)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-6)


def test_a_box_twice_as_large_as_the_map_still_has_all_its_adaptive_samples():
    features = np.random.default_rng(0).normal(size=(8, 10, 2)).astype(np.float32)
    boxes = np.array([[-5, -4, 15, 12], [0, 0, 20, 16], [-10, 2, 10, 5]], np.float32)
    pooled = roi_align(jnp.asarray(features), jnp.asarray(boxes), output_size=3, sampling_ratio=0, aligned=True)
    np.testing.assert_allclose(pooled, loop_roi_align(features, boxes, 3, 1, 0, aligned=True), atol=1e-5)


def test_the_adaptive_samples_of_a_box_beyond_that_are_limited_by_its_own_level(key):
    """Not by the finest, whose limit allows 64 times as many on P5."""
    features = [jax.random.normal(key, (side, side, 2)) for side in (32, 16)]
    box = jnp.array([[-100.0, -120.0, 400.0, 500.0]])
    pooled = multiscale_roi_align(features, box, image_shape=(128, 128), output_size=3, sampling_ratio=0)
    expected = roi_align(features[1], box, output_size=3, spatial_scale=1 / 8, sampling_ratio=0)
    assert float(jnp.abs(expected).max()) > 0.01
    np.testing.assert_allclose(pooled, expected, atol=1e-6)


@pytest.mark.parametrize("sampling_ratio", [2, 0])
def test_half_precision_features_stay_in_their_dtype_and_accumulate_wider(key, sampling_ratio):
    features = jax.random.normal(key, (8, 8, 4)).astype(jnp.bfloat16)
    boxes = jnp.array([[1.0, 1.0, 7.0, 6.0], [0.0, 0.0, 8.0, 8.0]])
    cotangent = jnp.ones((2, 2, 2, 4), jnp.bfloat16)

    @jax.jit
    def pool_and_pull_back(features, cotangent):
        pooled, transpose = jax.vjp(
            lambda f: roi_align(f, boxes, output_size=2, sampling_ratio=sampling_ratio), features
        )
        return pooled, transpose(cotangent)[0]

    expected = pool_and_pull_back(features.astype(jnp.float32), cotangent.astype(jnp.float32))
    for ours, wide in zip(pool_and_pull_back(features, cotangent), expected, strict=True):
        assert ours.dtype == jnp.bfloat16
        # One rounding of the result to 8 bits.
        np.testing.assert_allclose(ours.astype(jnp.float32), wide, rtol=2**-8)


@pytest.mark.slow
def test_adaptive_pooling_of_a_batch_equals_that_of_its_images():
    """Forward and backward; the images of a batch share the loops over the samples, but not the number of samples."""
    features, boxes, cotangent = random_pyramid(3, 37)
    boxes = boxes.at[1].multiply(0.1)  # few samples, beside images of many
    compiled = jax.jit(pull_back)
    images = [compiled([f[i] for f in features], boxes[i], cotangent[i]) for i in range(3)]
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *images)
    gradient_of_batch = jax.jit(jax.grad(batched_loss))(features, boxes, cotangent)
    batch_of_gradients = jax.jit(jax.vmap(pull_back))(features, boxes, cotangent)
    assert all(float(jnp.abs(gradient).max()) > 0.1 for gradient in expected[1])
    # Sums of up to a few hundred terms of about 1, compiled differently.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), batch_of_gradients, expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradient_of_batch, expected[1])


def test_the_loops_of_a_batch_never_copy_the_table():
    """Under a plain vmap each step would choose between the old and the new gradient table, of megabytes."""
    arguments = random_pyramid(3, 37)
    program = jax.jit(jax.grad(batched_loss)).lower(*arguments).as_text()
    table = f"x{48 * 64 + 24 * 32}x3xf32>"
    assert table in program
    assert not re.findall(f"stablehlo.select .*{table}", program)


@pytest.mark.slow
def test_a_batch_on_eight_devices_is_pooled_where_it_is():
    """Features, gradients and RoIs stay on their devices, which do not wait for each other."""
    arguments = random_pyramid(8, 20)
    mesh = make_mesh()
    expected = jax.jit(jax.vmap(pull_back))(*arguments)
    on_devices = on_each_device(lambda _, rows: jax.vmap(pull_back)(*rows), mesh, returns_rows=True)
    arguments = jax.device_put(arguments, split(mesh))
    compiled = jax.jit(on_devices).lower(None, arguments).compile()
    for ours, unsharded in zip(jax.tree.leaves(compiled(None, arguments)), jax.tree.leaves(expected), strict=True):
        assert ours.sharding.is_equivalent_to(split(mesh), ours.ndim)
        np.testing.assert_allclose(ours, unsharded, atol=1e-5)
    assert not re.findall(r"all-gather|all-reduce|all-to-all|collective-permute", compiled.as_text())


@pytest.mark.slow
def test_a_batch_may_share_its_features_or_its_boxes_and_be_of_batches():
    features, boxes, cotangent = random_pyramid(2, 5)
    first = [f[0] for f in features]
    expected = jax.jit(adaptive)(first, boxes[0])
    shared_features = jax.jit(jax.vmap(adaptive, in_axes=(None, 0)))(first, boxes)
    np.testing.assert_allclose(shared_features[0], expected, atol=1e-5)
    shared_boxes = jax.jit(jax.vmap(adaptive, in_axes=(0, None)))(features, boxes[0])
    np.testing.assert_allclose(shared_boxes[0], expected, atol=1e-5)
    nested = jax.jit(jax.vmap(jax.vmap(adaptive)))([f[None] for f in features], boxes[None])
    np.testing.assert_allclose(nested[0, 0], expected, atol=1e-5)
    gradient = jax.jit(jax.grad(lambda f: jnp.vdot(jax.vmap(adaptive, in_axes=(None, 0))(f, boxes), cotangent)))
    parts = [jax.jit(pull_back)(first, boxes[i], cotangent[i])[1] for i in range(2)]
    for ours, one, other in zip(gradient(first), *parts, strict=True):
        np.testing.assert_allclose(ours, one + other, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("sampling_ratio", [1, 0])
def test_roi_align_compiled_equals_eager_and_vmap_equals_a_loop(key, sampling_ratio):
    features = [jax.random.normal(key, (2, 32 // 2**i, 32 // 2**i, 3)) for i in range(4)]
    corner, size = jax.random.uniform(key, (2, 2, 6, 2)) * 64
    boxes = jnp.concatenate([corner, corner + 4 * size], axis=-1)

    def function(features, boxes):
        return ops.multiscale_roi_align(
            features, boxes, image_shape=(128, 128), output_size=3, sampling_ratio=sampling_ratio
        )

    compiled = jax.jit(function)
    loop = jnp.stack([compiled([f[i] for f in features], boxes[i]) for i in range(2)])
    np.testing.assert_allclose(loop[0], function([f[0] for f in features], boxes[0]), atol=1e-5)
    np.testing.assert_allclose(jax.vmap(function)(features, boxes), loop, atol=1e-5)
