"""RoIAlign against hand-computed values, its symmetries, and a plain loop over sample points."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskrcnn_jax.ops import roi_align as ops
from maskrcnn_jax.ops.roi_align import assign_levels

# Compiled as a whole: op by op, most of the time would go into compiling single operations.
roi_align = jax.jit(ops.roi_align, static_argnames=("output_size", "spatial_scale", "sampling_ratio", "aligned"))
multiscale_roi_align = jax.jit(ops.multiscale_roi_align, static_argnames=("image_shape", "output_size", "aligned"))


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
        for i, j in np.ndindex(output_size, output_size):
            for a, b in np.ndindex(sampling_ratio, sampling_ratio):
                y = y1 + (i + (a + 0.5) / sampling_ratio) * h / output_size
                x = x1 + (j + (b + 0.5) / sampling_ratio) * w / output_size
                pooled[r, i, j] += interpolate(y, x) / sampling_ratio**2
    return pooled


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


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("sampling_ratio", [1, 2, 3])
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
    np.testing.assert_array_equal(assign_levels(boxes, finest=2, coarsest=5), [2, 2, 2, 3, 3, 4, 5, 5])


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


@pytest.mark.parametrize("num_rois", [0, 1, 17])
def test_the_chunked_gradient_equals_that_of_the_plain_sum(num_rois):
    """Pooling is linear in the features, so the gradient is the transpose: <g, pool(f)> = <pool^T(g), f>."""
    rng = np.random.default_rng(num_rois)
    features = jnp.asarray(rng.normal(size=(8, 8, 3)).astype(np.float32))
    corner = rng.uniform(-4, 28, (num_rois, 2))
    boxes = jnp.asarray(np.concatenate([corner, corner + rng.uniform(0, 20, (num_rois, 2))], axis=-1), jnp.float32)
    cotangent = jnp.asarray(rng.normal(size=(num_rois, 2, 2, 3)).astype(np.float32))

    def pool(features):
        return roi_align(features, boxes, output_size=2, spatial_scale=0.25)

    def pull_back(features):
        pooled, transpose = jax.vjp(pool, features)
        return pooled, transpose(cotangent)[0]

    pooled, gradient = jax.jit(pull_back)(features)
    direction = jnp.asarray(rng.normal(size=(8, 8, 3)).astype(np.float32))
    assert gradient.shape == features.shape
    assert bool(jnp.all(jnp.isfinite(gradient)))
    np.testing.assert_allclose(jnp.vdot(gradient, direction), jnp.vdot(cotangent, pool(direction)), atol=2e-4)
    np.testing.assert_allclose(jnp.vdot(gradient, features), jnp.vdot(cotangent, pooled), atol=2e-4)


def test_no_gradient_flows_to_the_boxes(key):
    features = jax.random.normal(key, (8, 8, 2))
    gradient = jax.jit(jax.grad(lambda boxes: roi_align(features, boxes, output_size=2).sum()))
    gradient = gradient(jnp.array([[1.0, 1.0, 5.0, 6.0]]))
    np.testing.assert_array_equal(gradient, jnp.zeros((1, 4)))


def test_no_boxes_pool_to_nothing():
    assert roi_align(jnp.ones((4, 4, 3)), jnp.zeros((0, 4)), output_size=2).shape == (0, 2, 2, 3)


def test_additional_boxes_change_nothing_whatever_they_hold(key):
    features = jax.random.normal(key, (8, 8, 2))
    boxes = jnp.array([[1.0, 1.0, 5.0, 6.0]])
    garbage = jnp.array([[jnp.nan] * 4, [1e30] * 4, [-jnp.inf, 0.0, jnp.inf, 1.0], [9.0, 9.0, -9.0, -9.0]])
    pooled = roi_align(features, jnp.concatenate([boxes, garbage]), output_size=2)
    np.testing.assert_array_equal(pooled[:1], roi_align(features, boxes, output_size=2))


def test_half_precision_features_stay_in_their_dtype_and_accumulate_wider(key):
    features = jax.random.normal(key, (8, 8, 4))
    boxes = jnp.array([[1.0, 1.0, 7.0, 6.0]])
    pooled = roi_align(features.astype(jnp.bfloat16), boxes, output_size=2)
    assert pooled.dtype == jnp.bfloat16
    expected = roi_align(features.astype(jnp.bfloat16).astype(jnp.float32), boxes, output_size=2)
    # One rounding of the result to 8 bits.
    np.testing.assert_allclose(pooled.astype(jnp.float32), expected, rtol=2**-8)


@pytest.mark.slow
def test_roi_align_compiled_equals_eager_and_vmap_equals_a_loop(key):
    features = [jax.random.normal(key, (2, 32 // 2**i, 32 // 2**i, 3)) for i in range(4)]
    corner, size = jax.random.uniform(key, (2, 2, 6, 2)) * 64
    boxes = jnp.concatenate([corner, corner + 4 * size], axis=-1)

    def function(features, boxes):
        return ops.multiscale_roi_align(features, boxes, image_shape=(128, 128), output_size=3, sampling_ratio=1)

    compiled = jax.jit(function)
    loop = jnp.stack([compiled([f[i] for f in features], boxes[i]) for i in range(2)])
    np.testing.assert_allclose(loop[0], function([f[0] for f in features], boxes[0]), atol=1e-5)
    np.testing.assert_allclose(jax.vmap(function)(features, boxes), loop, atol=1e-5)
