"""Masks come to lie where torchvision puts them, and their run lengths are those of pycocotools."""

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from maskrcnn_jax.inference.paste import encode_rle, paste_mask

FULL = np.ones((28, 28), np.float32)


def whole(crop, y0, x0, image_size):
    image = np.zeros(image_size, np.uint8, order="F")
    image[y0 : y0 + crop.shape[0], x0 : x0 + crop.shape[1]] = crop
    return image


def pycocotools_rle(image):
    rle = coco_mask.encode(np.asfortranarray(image))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def random_masks(rng, number):
    """Blobs with smooth borders, so that the threshold cuts between pixels."""
    coarse = rng.uniform(-3, 3, (number, 7, 7))
    smooth = np.stack([np.kron(c, np.ones((4, 4))) for c in coarse])
    smooth = (smooth + np.roll(smooth, 1, 1) + np.roll(smooth, 1, 2) + np.roll(smooth, 2, (1, 2))) / 4
    return (1 / (1 + np.exp(-smooth))).astype(np.float32)


def random_boxes(rng, number, height, width):
    x, y = np.sort(rng.uniform(0, width, (2, number)), 0), np.sort(rng.uniform(0, height, (2, number)), 0)
    return np.stack([x[0], y[0], x[1], y[1]], 1).astype(np.float32)


def test_a_full_mask_fills_its_box_as_computed_by_hand():
    # (10, 20, 38, 76) grows by 30/28 about (24, 48): half sides 15 and 30, so columns 9..39 and rows 18..78. Those
    # are 31 columns and 61 rows for 30 mask pixels of which the outermost are zero: on both axes the interpolated
    # value reaches 0.5 about one mask pixel inside; the corners lose a pixel where both factors are below one.
    crop, y0, x0 = paste_mask(FULL, np.array([10, 20, 38, 76], np.float32), (100, 50))
    assert (y0, x0, crop.shape, crop.dtype) == (18, 9, (61, 31), np.uint8)
    # column k samples (k + 0.5) * 30 / 31 - 0.5 in mask pixels: 0.95 for k = 1, which is 95 % of a full pixel, but
    # -0.02 for k = 0; row k samples (k + 0.5) * 30 / 61 - 0.5: 0.24 for k = 1 and 0.73 for k = 2.
    assert np.flatnonzero(crop[30]).tolist() == list(range(1, 30))
    assert np.flatnonzero(crop[:, 15]).tolist() == list(range(2, 59))


def test_a_box_at_the_corner_is_cut_at_the_border():
    crop, y0, x0 = paste_mask(FULL, np.array([0, 0, 28, 28], np.float32), (20, 25))
    # 28 grows to -1..29: row and column 0 of the image are the second of 31, inside the mask.
    assert (y0, x0, crop.shape) == (0, 0, (20, 25))
    assert crop.all()


@pytest.mark.parametrize("box", [[3, 4, 3, 4], [3, 4, 3.4, 30], [0, 0, 0, 0], [49, 99, 50, 100]])
def test_a_degenerate_box_gives_at_least_one_pixel_inside_the_image(box):
    crop, y0, x0 = paste_mask(FULL, np.array(box, np.float32), (100, 50))
    assert crop.size >= 1
    assert y0 + crop.shape[0] <= 100 and x0 + crop.shape[1] <= 50
    assert encode_rle(crop, y0, x0, (100, 50)) == pycocotools_rle(whole(crop, y0, x0, (100, 50)))


def test_a_box_outside_the_image_gives_an_empty_mask():
    crop, y0, x0 = paste_mask(FULL, np.array([60, 10, 80, 20], np.float32), (100, 50))
    assert crop.size == 0
    assert encode_rle(crop, y0, x0, (100, 50)) == pycocotools_rle(np.zeros((100, 50), np.uint8))


def test_run_lengths_equal_a_literal():
    # 2 rows x 3 columns, down the columns: 0 1 | 1 0 | 0 0 -> one zero, two ones, three zeros.
    crop = np.array([[0, 1], [1, 0]], np.uint8)
    rle = encode_rle(crop, 0, 0, (2, 3))
    assert rle == {"size": [2, 3], "counts": "123"}


@pytest.mark.parametrize(
    ("y0", "x0", "height", "width"),
    [(0, 0, 7, 9), (0, 2, 7, 3), (2, 0, 5, 9), (3, 4, 2, 2), (6, 8, 1, 1), (1, 1, 0, 4)],
)
@pytest.mark.parametrize("fill", [0.0, 0.5, 1.0])
def test_run_lengths_equal_pycocotools_wherever_the_crop_lies(y0, x0, height, width, fill):
    rng = np.random.default_rng(y0 + 10 * x0)
    for _ in range(20):
        crop = (rng.random((height, width)) < fill).astype(np.uint8)
        assert encode_rle(crop, y0, x0, (7, 9)) == pycocotools_rle(whole(crop, y0, x0, (7, 9)))


def test_random_masks_round_trip_through_their_run_lengths():
    rng = np.random.default_rng(0)
    boxes = random_boxes(rng, 50, 120, 90)
    for mask, box in zip(random_masks(rng, 50), boxes, strict=True):
        crop, y0, x0 = paste_mask(mask, box, (120, 90))
        image = whole(crop, y0, x0, (120, 90))
        rle = encode_rle(crop, y0, x0, (120, 90))
        assert rle == pycocotools_rle(image)
        np.testing.assert_array_equal(coco_mask.decode(rle), image)


@pytest.mark.parametrize("image_size", [(480, 640), (97, 61)])
def test_pasted_masks_equal_those_of_torchvision(image_size):
    torch = pytest.importorskip("torch")
    from tools.torchvision_reference import import_torchvision

    paste_masks_in_image = import_torchvision().models.detection.roi_heads.paste_masks_in_image
    rng = np.random.default_rng(1)
    masks, boxes = random_masks(rng, 60), random_boxes(rng, 60, *image_size)
    boxes[:4] = [[0, 0, image_size[1], image_size[0]], [5, 5, 5, 5], [0, 0, 0.3, 9], [3, 7, 31, 35]]
    theirs = paste_masks_in_image(torch.from_numpy(masks)[:, None], torch.from_numpy(boxes), image_size)
    theirs = theirs[:, 0].numpy()
    for index, (mask, box) in enumerate(zip(masks, boxes, strict=True)):
        ours = whole(*paste_mask(mask, box, image_size), image_size)
        # A pixel may only differ where the reference is at the threshold to within float32 rounding.
        differs = ours != (theirs[index] >= 0.5)
        assert np.all(np.abs(theirs[index][differs] - 0.5) < 1e-5), index
        assert differs.sum() <= 2, index


def test_an_aligned_mask_of_a_box_of_28_pixels_is_the_mask_itself():
    mask = np.random.default_rng(0).random((28, 28)).astype(np.float32)
    crop, y0, x0 = paste_mask(mask, np.array([7, 3, 35, 31], np.float32), (40, 50), aligned=True)
    assert (y0, x0) == (3, 7)
    np.testing.assert_array_equal(crop, mask >= 0.5)


def test_an_aligned_mask_covers_the_pixels_whose_centre_is_in_the_box():
    full = np.ones((28, 28), np.float32)
    # Fades below 0.5 within half a cell of the edge, here 1 / 28 of a pixel.
    crop, y0, x0 = paste_mask(full, np.array([2.4, 1.6, 4.4, 3.6], np.float32), (10, 10), aligned=True)
    covered = np.zeros((10, 10), np.uint8)
    covered[y0 : y0 + crop.shape[0], x0 : x0 + crop.shape[1]] = crop
    expected = np.zeros((10, 10), np.uint8)
    expected[2:4, 2:4] = 1
    np.testing.assert_array_equal(covered, expected)


def test_an_aligned_mask_is_cut_at_the_border_of_the_image_and_may_be_empty():
    full = np.ones((28, 28), np.float32)
    crop, y0, x0 = paste_mask(full, np.array([-5, 6, 5, 20], np.float32), (10, 8), aligned=True)
    assert (crop.shape, y0, x0, int(crop.sum())) == ((4, 5), 6, 0, 20)
    crop, _, _ = paste_mask(full, np.array([20, 20, 30, 30], np.float32), (10, 8), aligned=True)
    assert crop.size == 0
    assert encode_rle(crop, 10, 8, (10, 8))["size"] == [10, 8]


def test_aligned_pasting_equals_detectron2s_rule_computed_on_the_whole_image():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(1)
    for _ in range(20):
        mask = rng.random((28, 28)).astype(np.float32)
        corner, size = rng.uniform(-10, 60, 2), rng.uniform(3, 60, 2)
        box = np.concatenate([corner, corner + size]).astype(np.float32)
        y, x = torch.arange(70) + 0.5, torch.arange(90) + 0.5
        y = (y - box[1]) / (box[3] - box[1]) * 2 - 1
        x = (x - box[0]) / (box[2] - box[0]) * 2 - 1
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)[None]
        sampled = torch.nn.functional.grid_sample(torch.from_numpy(mask)[None, None], grid, align_corners=False)
        crop, y0, x0 = paste_mask(mask, box, (70, 90), aligned=True)
        whole = np.zeros((70, 90), np.uint8)
        whole[y0 : y0 + crop.shape[0], x0 : x0 + crop.shape[1]] = crop
        # Values within rounding of the threshold may fall either way.
        clear = np.abs(sampled[0, 0].numpy() - 0.5) > 1e-5
        np.testing.assert_array_equal(whole[clear], (sampled[0, 0].numpy() >= 0.5)[clear])
