"""RoIPool against a loop over bins and cells, and against torchvision's operator where that loads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskrcnn_jax.ops.roi_pool import multiscale_roi_pool, roi_pool


def loop_over_bins(features, boxes, output_size, scale):
    """Return pooled values and, for each, the cell it came from; C's rounding, in the precision of the boxes."""
    height, width, channels = features.shape
    pooled = np.zeros((len(boxes), output_size, output_size, channels), features.dtype)
    taken = np.full((*pooled.shape, 2), -1)
    for r, box in enumerate(boxes):
        x1, y1, x2, y2 = (int(np.sign(v) * np.floor(abs(v) + box.dtype.type(0.5))) for v in box * scale)
        bins = [box.dtype.type(max(b - a + 1, 1)) / box.dtype.type(output_size) for a, b in ((y1, y2), (x1, x2))]
        for i, j in np.ndindex(output_size, output_size):
            limits = []
            for k, start, bin_size, size in ((i, y1, bins[0], height), (j, x1, bins[1], width)):
                low, high = int(np.floor(k * bin_size)) + start, int(np.ceil((k + 1) * bin_size)) + start
                limits.append((min(max(low, 0), size), min(max(high, 0), size)))
            (top, bottom), (left, right) = limits
            for channel in range(channels) if bottom > top and right > left else ():
                window = features[top:bottom, left:right, channel]
                y, x = np.unravel_index(np.argmax(window), window.shape)
                pooled[r, i, j, channel] = window[y, x]
                taken[r, i, j, channel] = top + y, left + x
    return pooled, taken


def case(dtype="float32"):
    rng = np.random.default_rng(0)
    # Few values, so that there are ties: the first cell wins.
    features = rng.integers(0, 6, (13, 17, 3)).astype(dtype)
    corner = rng.uniform(-4, 60, (40, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(0, 50, (40, 2))], axis=1).astype(dtype)
    boxes[0] = [200, 200, 240, 240]  # beyond the map: nothing
    boxes[1] = [0, 0, 67.9, 51.9]  # all of it
    boxes[2] = [10, 10, 10, 10]  # one cell for all bins; 10 / 4 is a half
    return features, boxes


@pytest.mark.parametrize("output_size", [3, 7])
def test_every_bin_is_the_largest_of_its_cells(output_size):
    features, boxes = case()
    expected, _ = loop_over_bins(features, boxes, output_size, 0.25)
    pooled = jax.jit(lambda f, b: roi_pool(f, b, output_size=output_size, spatial_scale=0.25))(features, boxes)
    np.testing.assert_array_equal(pooled, expected)
    assert not np.any(pooled[0])
    assert len(np.unique(pooled[2].reshape(-1, 3), axis=0)) == 1


def test_the_gradient_goes_to_the_cell_that_was_taken():
    features, boxes = case()
    upstream = np.random.default_rng(1).normal(size=(len(boxes), 3, 3, 3)).astype(np.float32)
    _, taken = loop_over_bins(features, boxes, 3, 0.25)
    expected = np.zeros_like(features)
    for r, i, j, channel in np.ndindex(upstream.shape):
        y, x = taken[r, i, j, channel]
        if y >= 0:
            expected[y, x, channel] += upstream[r, i, j, channel]

    def total(features):
        return jnp.sum(roi_pool(features, jnp.asarray(boxes), output_size=3, spatial_scale=0.25) * upstream)

    np.testing.assert_allclose(jax.jit(jax.grad(total))(jnp.asarray(features)), expected, atol=1e-5)


def test_boxes_of_a_batch_are_pooled_from_the_levels_of_their_sizes():
    rng = np.random.default_rng(2)
    image_shape = (256, 256)
    features = [rng.normal(size=(2, 256 // s, 256 // s, 4)).astype(np.float32) for s in (4, 8, 16, 32)]
    boxes = np.array([[[8, 8, 40, 40], [0, 0, 150, 150]], [[0, 0, 255, 255], [30, 60, 90, 80]]], np.float32)
    levels = [[0, 1], [2, 0]]  # of 112, 224 and 448 pixels
    pool = jax.vmap(lambda f, b: multiscale_roi_pool(f, b, image_shape=image_shape, output_size=7))
    pooled = jax.jit(pool)(features, boxes)
    for image, r in np.ndindex(2, 2):
        level = levels[image][r]
        one = boxes[image, r][None]
        expected, _ = loop_over_bins(features[level][image], one, 7, np.float32(0.25 / 2**level))
        np.testing.assert_array_equal(pooled[image, r], expected[0])


def test_no_boxes_pool_to_nothing():
    assert roi_pool(jnp.ones((4, 4, 2)), jnp.zeros((0, 4)), output_size=2).shape == (0, 2, 2, 2)


@pytest.mark.parametrize("output_size", [7, 14])
def test_values_and_gradients_equal_torchvisions_operator(output_size):
    torch = pytest.importorskip("torch")
    from tools.torchvision_reference import compiled_operators_load, import_torchvision

    if not compiled_operators_load():
        pytest.skip("the installed torchvision brings no operators that this torch can load")
    features, boxes = case()
    upstream = np.random.default_rng(1).normal(size=(len(boxes), output_size, output_size, 3)).astype(np.float32)
    maps = torch.tensor(features).permute(2, 0, 1)[None].requires_grad_()
    theirs = import_torchvision().ops.roi_pool(maps, [torch.tensor(boxes)], output_size, 0.25)
    theirs.backward(torch.tensor(upstream).permute(0, 3, 1, 2))
    pooled, pull = jax.vjp(
        lambda f: roi_pool(f, jnp.asarray(boxes), output_size=output_size, spatial_scale=0.25), jnp.asarray(features)
    )
    np.testing.assert_array_equal(pooled, theirs.detach().permute(0, 2, 3, 1))
    np.testing.assert_allclose(pull(jnp.asarray(upstream))[0], maps.grad[0].permute(1, 2, 0), atol=1e-5)
