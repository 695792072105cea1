import numpy as np
import pytest

from maskrcnn_jax.data import transforms
from maskrcnn_jax.data.run_lengths import cut_out


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((480, 640), (800, 1066)),  # 640 * 800 / 480 = 1066.67
        ((427, 640), (800, 1199)),  # 1199.06
        ((640, 427), (1199, 800)),
        ((500, 333), (1201, 800)),
        ((375, 1000), (499, 1333)),  # the long side decides: 375 * 1.333 = 499.9
        ((800, 800), (800, 800)),
        ((1, 3000), (1, 1333)),  # never vanishes
    ],
)
def test_sizes_after_resizing_are_floored(size, expected):
    assert transforms.resized_size(*size, 800, 1333) == expected


def test_sizes_of_many_images_equal_those_of_one():
    sizes = np.random.default_rng(0).integers(50, 2000, (200, 2))
    many = transforms.resized_sizes(sizes, 800, 1333)
    assert many.dtype == np.int32
    assert [tuple(row) for row in many.tolist()] == [transforms.resized_size(h, w, 800, 1333) for h, w in sizes]


def test_resizing_interpolates_between_pixel_centres():
    image = np.repeat(np.array([[[0], [100]]], np.uint8), 3, axis=2)  # one row: black, grey
    for dtype in ("uint8", "float32"):
        resized = transforms.resize_image(image, (1, 4), dtype)
        assert resized.dtype == dtype
        np.testing.assert_array_equal(resized[0, :, 0], [0, 25, 75, 100])


def test_boxes_scale_by_the_ratio_of_the_sizes_of_each_axis():
    boxes = np.array([[10, 20, 30, 40]], np.float32)
    scaled = transforms.scale_boxes(boxes, (100, 200), (150, 400))
    assert scaled.dtype == np.float32
    np.testing.assert_array_equal(scaled, [[20, 30, 60, 60]])


def test_a_flip_mirrors_image_boxes_and_masks_alike():
    mask = np.zeros((4, 6), np.uint8)
    mask[1:3, 0:2] = 1
    box = np.array([[0, 1, 2, 3]], np.float32)
    np.testing.assert_array_equal(transforms.hflip_boxes(box, 6), [[4, 1, 6, 3]])
    _, windows, _ = transforms.pack_masks([cut_out(mask)], (4, 6), (4, 6), 8, flip=True)
    assert windows.tolist() == [[1, 4, 2, 2]]
    np.testing.assert_array_equal(cut_out(transforms.hflip_image(mask[:, :, None])[:, :, 0])[1:], (1, 4))


def test_flipping_twice_changes_nothing():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (5, 7, 3), np.uint8)
    boxes = np.array([[1, 2, 3, 4], [0, 0, 7, 5]], np.float32)
    np.testing.assert_array_equal(transforms.hflip_image(transforms.hflip_image(image)), image)
    np.testing.assert_array_equal(transforms.hflip_boxes(transforms.hflip_boxes(boxes, 7), 7), boxes)


class _Fixed:
    """Stands in for a random generator: the order and the three factors given."""

    def __init__(self, order, factors):
        self.order, self.factors = order, factors

    def permutation(self, num):
        return self.order

    def uniform(self, low, high, num):
        return np.array(self.factors)


@pytest.mark.parametrize(
    ("order", "factors", "expected"),
    [
        # Two pixels, (100, 0, 0) and (200, 200, 200), whose grey values are 29 (29.89 floored) and 199 (199.98).
        ([0, 1, 2], [1.5, 1, 1], [[150, 0, 0], [255, 255, 255]]),  # brightness
        ([0, 1, 2], [1, 0.5, 1], [[107, 57, 57], [157, 157, 157]]),  # contrast: mean grey 114
        ([0, 1, 2], [1, 1, 0], [[29, 29, 29], [199, 199, 199]]),  # saturation 0 is grey
        ([2, 1, 0], [2, 1, 0], [[58, 58, 58], [255, 255, 255]]),  # grey first, then twice as bright
    ],
)
def test_colour_changes_follow_torchvisions_formulas(order, factors, expected):
    image = np.array([[[100, 0, 0], [200, 200, 200]]], np.uint8)
    np.testing.assert_array_equal(transforms.color_jitter(image, 0.5, _Fixed(order, factors))[0], expected)


def test_colour_changes_of_large_images_are_those_of_small_ones():
    small = np.array([[[100, 0, 0], [200, 200, 200]]], np.uint8)
    large = np.tile(small, (300, 250, 1))  # in several parts
    factors = _Fixed([1, 2, 0], [1.2, 0.5, 1.5])
    expected = np.tile(transforms.color_jitter(small, 0.5, factors), (300, 250, 1))
    np.testing.assert_array_equal(transforms.color_jitter(large, 0.5, factors), expected)


def test_colour_jitter_depends_on_the_generator_alone_and_strength_0_changes_nothing():
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    first, again, other = (transforms.color_jitter(image, 0.4, np.random.default_rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert first.dtype == np.uint8
    np.testing.assert_array_equal(transforms.color_jitter(image, 0.0, np.random.default_rng(1)), image)


def unpack(canvas, window):
    return np.unpackbits(canvas, axis=1, bitorder="little")[: window[2], : window[3]]


def test_masks_are_packed_in_their_own_boxes_lowest_bit_first():
    mask = np.zeros((20, 30), np.uint8)
    mask[5, [3, 6, 12]] = 1
    (canvas,), (window,), raster = transforms.pack_masks([cut_out(mask)], (20, 30), (20, 30), 16)
    assert raster == (20, 30)
    assert window.tolist() == [5, 3, 1, 10]
    assert canvas.shape == (16, 2)
    np.testing.assert_array_equal(canvas[0], [1 + 8, 2])
    assert not canvas[1:].any()


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("size", [(37, 51), (74, 102), (36, 50), (20, 17), (7, 9)])
def test_packed_masks_are_those_of_the_raster_that_torchvision_resizes(size, flip):
    masks = np.random.default_rng(0).random((3, 37, 51)) > np.array([0.5, 0.9, 0.999])[:, None, None]
    masks[1, :, :20] = masks[1, 30:] = False
    packed, windows, raster = transforms.pack_masks([cut_out(mask) for mask in masks], (37, 51), size, 64, flip=flip)
    assert raster == (min(37, size[0]), min(51, size[1]))
    wanted = masks[:, :, ::-1] if flip else masks
    wanted = wanted[:, np.arange(raster[0]) * 37 // raster[0]][:, :, np.arange(raster[1]) * 51 // raster[1]]
    for canvas, (y, x, height, width), mask in zip(packed, windows, wanted, strict=True):
        found = np.zeros(raster, bool)
        found[y : y + height, x : x + width] = unpack(canvas, (y, x, height, width))
        np.testing.assert_array_equal(found, mask)
        assert np.unpackbits(canvas).sum() == mask.sum()


def test_masks_larger_than_the_canvas_are_sampled_in_the_middle_of_its_cells():
    mask = np.random.default_rng(0).integers(0, 2, (30, 12), np.uint8)
    mask[[0, -1]] = 1
    mask[:, [0, -1]] = 1
    (canvas,), (window,), _ = transforms.pack_masks([cut_out(mask)], (30, 12), (30, 12), 16)
    assert window.tolist() == [0, 0, 30, 12]
    np.testing.assert_array_equal(unpack(canvas, (0, 0, 16, 12)), mask[(2 * np.arange(16) + 1) * 30 // 32])


def test_no_masks_pack_to_no_canvases_and_objects_without_one_to_nothing():
    assert transforms.pack_masks([], (30, 20), (30, 20), 64)[0].shape == (0, 64, 8)
    packed, windows, _ = transforms.pack_masks([None], (30, 20), (30, 20), 64)
    assert not packed.any()
    assert not windows.any()
