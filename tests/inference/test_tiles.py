"""Every object of a large image is found once, wherever the borders of the tiles are."""

import functools
import tracemalloc

import cv2
import numpy as np
import pytest

from maskrcnn_jax.errors import UserError
from maskrcnn_jax.inference.paste import paste_mask
from maskrcnn_jax.inference.results import Instances
from maskrcnn_jax.inference.tiles import Tiling, detect_in_tiles
from tests.inference.test_media import FakePredictor


def find_blobs(images, side=28, seen=None):
    """Detect the connected regions of each colour: red is label 1, green 2, blue 3; brighter ones score higher."""
    for image in images:
        if seen is not None:
            seen.append(image.shape)
        boxes, scores, labels, masks = [], [], [], []
        for channel in range(3):
            _, regions, stats, _ = cv2.connectedComponentsWithStats((image[..., channel] > 50).astype(np.uint8))
            for number, (x, y, width, height, _) in list(enumerate(stats))[1:]:
                region = regions[y : y + height, x : x + width] == number
                boxes.append([x, y, x + width, y + height])
                scores.append(image[y : y + height, x : x + width, channel][region].mean() / 256)
                labels.append(channel + 1)
                masks.append(cv2.resize(region.astype(np.float32), (side, side), interpolation=cv2.INTER_AREA))
        order = np.argsort(-np.array(scores), kind="stable")
        yield Instances(
            np.array(boxes, np.float32).reshape(-1, 4)[order],
            np.array(scores, np.float32)[order],
            np.array(labels, np.int32)[order],
            np.array(masks, np.float32).reshape(-1, side, side)[order],
        )


def detect(image, find=find_blobs, *, iou_threshold=0.5, class_agnostic=False, **tiling):
    return detect_in_tiles(find, image, Tiling(**tiling), iou_threshold=iou_threshold, class_agnostic=class_agnostic)


def pasted(found, row, size):
    whole = np.zeros(size, bool)
    crop, y, x = paste_mask(found.masks[row], found.boxes[row], size, aligned=True)
    whole[y : y + crop.shape[0], x : x + crop.shape[1]] = crop
    return whole


def mask_iou(a, b):
    return (a & b).sum() / (a | b).sum()


def draw_ellipse(image, centre, axes, colour, angle=0.0):
    cv2.ellipse(image, (centre, (2 * axes[0], 2 * axes[1]), angle), colour, -1)


def in_order(boxes):
    boxes = np.asarray(boxes, np.float32).reshape(-1, 4)
    return boxes[np.lexsort(boxes.T)]


@pytest.mark.parametrize(
    ("size", "tiling", "expected"),
    [
        ((100, 100), Tiling(64, 0.0), [[0, 0], [36, 0], [0, 36], [36, 36]]),
        ((64, 128), Tiling(64, 0.0), [[0, 0], [64, 0]]),
        ((64, 128), Tiling(64, 0.25), [[0, 0], [32, 0], [64, 0]]),
        ((40, 50), Tiling(64, 0.25), [[0, 0]]),
        ((40, 300), Tiling(100, 0.2), [[0, 0], [67, 0], [133, 0], [200, 0]]),
    ],
)
def test_tiles_cover_the_image_and_overlap_as_asked(size, tiling, expected):
    windows = tiling.windows(*size)
    assert windows[:, :2].tolist() == expected
    sides = np.minimum(tiling.size, size[::-1])
    np.testing.assert_array_equal(windows[:, 2:] - windows[:, :2], np.tile(sides, (len(windows), 1)))
    assert windows[:, 2:].max(axis=0).tolist() == list(size[::-1])
    assert np.diff(np.unique(windows[:, 0])).max(initial=0) <= tiling.size * (1 - tiling.overlap)


def test_the_whole_image_is_a_tile_of_its_own_only_if_it_is_larger_than_one():
    assert Tiling(64, 0.0, whole_image=True).windows(100, 64)[-1].tolist() == [0, 0, 64, 100]
    assert len(Tiling(64, 0.0, whole_image=True).windows(64, 64)) == 1


@pytest.mark.parametrize("tiling", [Tiling(0), Tiling(16), Tiling(64, -0.1), Tiling(64, 1.0)])
def test_impossible_tiles_are_refused(tiling):
    with pytest.raises(UserError, match="use"):
        tiling.check()


def test_twelve_objects_on_the_seams_of_a_large_image_are_found_once_each():
    image = np.zeros((3000, 4000, 3), np.uint8)
    tiling = Tiling(1024, 0.2)
    windows = tiling.windows(3000, 4000)
    x_seams, y_seams = np.unique(windows[windows[:, 0] > 0, 0]), np.unique(windows[windows[:, 1] > 0, 1])
    for index in range(12):
        x, y = int(x_seams[index % 4]), int(y_seams[index // 4 % len(y_seams)])
        # On the left border of a tile, on an upper one, on the corner, and on the right border of the tile before.
        shift = [(0, 500), (410, 0), (0, 0), (1024 - (x_seams[1] - x_seams[0]), 350)][index // 3]
        centre = (x + int(shift[0]) - (index % 2) * 20, y + int(shift[1]) + (index % 3) * 15)
        colour = np.roll([100 + 10 * index, 0, 0], index).tolist()
        draw_ellipse(image, centre, (30 + 3 * index, 75 - 2 * index), colour, 15.0 * index)
    (whole,) = find_blobs([image])
    found = detect(image, size=1024, overlap=0.2)
    assert len(found.scores) == len(whole.scores) == 12
    np.testing.assert_array_equal(in_order(found.boxes), in_order(whole.boxes))
    assert (np.diff(found.scores) <= 0).all()
    in_pieces = sum(len(of_tile.scores) for of_tile in find_blobs(image[y1:y2, x1:x2] for x1, y1, x2, y2 in windows))
    assert in_pieces > 20, "the objects are not on seams"


def test_an_object_larger_than_the_overlap_is_joined_from_its_parts():
    image = np.zeros((300, 700, 3), np.uint8)
    draw_ellipse(image, (350, 150), (300, 120), (200, 0, 0), 5.0)
    found = detect(image, size=256, overlap=0.25)
    (truth,) = find_blobs([image])
    assert len(found.scores) == 1
    np.testing.assert_array_equal(found.boxes, truth.boxes)
    assert mask_iou(pasted(found, 0, (300, 700)), image[..., 0] > 50) > 0.95


def test_two_objects_across_the_same_seam_are_not_joined():
    # Slanted bars: the right part of the upper one lies in the box of the left part of the lower one.
    image = np.zeros((300, 525, 3), np.uint8)
    cv2.line(image, (20, 20), (420, 180), (200, 0, 0), 15)
    cv2.line(image, (20, 100), (420, 260), (220, 0, 0), 15)
    (whole,) = find_blobs([image])
    found = detect(image, size=300, overlap=0.25)
    np.testing.assert_array_equal(in_order(found.boxes), in_order(whole.boxes))
    assert len(found.scores) == 2


def test_objects_of_different_classes_in_one_place_stay_unless_classes_do_not_matter():
    image = np.zeros((128, 224, 3), np.uint8)
    image[40:80, 60:150, 0] = 200
    image[42:80, 60:150, 1] = 220
    image[42:80, 170:190, 1] = 220
    assert len(detect(image, size=128, overlap=0.25).scores) == 3
    assert detect(image, size=128, overlap=0.25, class_agnostic=True).labels.tolist() == [2, 2]


def test_a_piece_that_looks_like_another_class_goes():
    def find(images):
        """Detect green where the left border cuts an object: half a disc is no disc."""
        for found in find_blobs(images):
            yield found._replace(labels=np.where(found.boxes[:, 0] == 0, 2, found.labels))

    image = np.zeros((128, 224, 3), np.uint8)
    draw_ellipse(image, (104, 60), (14, 14), (200, 0, 0))  # the second tile begins at 96
    found = detect(image, find, size=128, overlap=0.25)
    assert found.labels.tolist() == [1] and found.boxes[0, 0] == 90


def test_a_small_object_inside_the_box_of_a_piece_stays():
    # An L and a dot in its corner: the dot is in the box of the L, but not in its mask.
    image = np.zeros((128, 224, 3), np.uint8)
    image[20:110, 30:40, 0] = image[100:110, 30:200, 0] = 200
    image[40:60, 93:110, 0] = 220
    found = detect(image, size=128, overlap=0.25)
    np.testing.assert_array_equal(in_order(found.boxes), in_order([[30, 20, 200, 110], [93, 40, 110, 60]]))


def test_the_whole_image_replaces_the_pieces_of_what_is_larger_than_tiles():
    def find(images):
        """Find nothing of an object that fills the tile, of which a network may not know what it is, either."""
        for image in images:
            (found,) = find_blobs([image])
            sides = found.boxes[:, 2:] - found.boxes[:, :2]
            rows = (sides < 128).any(axis=1) | (len(image) > 128)
            yield Instances(*(values[rows] for values in found))

    image = np.zeros((600, 600, 3), np.uint8)
    draw_ellipse(image, (300, 300), (280, 260), (180, 0, 0))
    draw_ellipse(image, (30, 30), (12, 12), (240, 0, 0))
    (truth,) = find_blobs([image])
    found = detect(image, find, size=128, overlap=0.2, whole_image=True)
    np.testing.assert_array_equal(in_order(found.boxes), in_order(truth.boxes))
    large = int(np.argmin(found.scores))
    assert mask_iou(pasted(found, large, (600, 600)), pasted(truth, 1, (600, 600))) > 0.99, "not from the whole image"


@pytest.mark.parametrize("size", [(100, 100), (128, 128), (64, 90)])
def test_an_image_that_is_no_larger_than_a_tile_is_detected_as_it_is(size):
    image = np.random.default_rng(0).integers(0, 200, (*size, 3)).astype(np.uint8)
    image = cv2.GaussianBlur(image, (0, 0), 4) // 2 * 2
    image[image < 95] = 0
    (plain,) = find_blobs([image])
    assert len(plain.scores) > 3
    for ours, theirs in zip(detect(image, size=128, whole_image=True), plain, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_an_image_without_objects_has_no_detections():
    found = detect(np.zeros((300, 300, 3), np.uint8), size=128)
    assert found.boxes.shape == (0, 4) and found.masks.shape == (0, 28, 28)


@pytest.mark.parametrize("seed", range(5))
def test_objects_that_fit_into_the_overlap_are_found_as_in_the_whole_image(seed):
    rng = np.random.default_rng(seed)
    image = np.zeros((700, 900, 3), np.uint8)
    for _ in range(60):
        axes, angle = rng.integers(4, 22, 2).tolist(), rng.uniform(0, 180)
        centre = (int(rng.integers(0, 900)), int(rng.integers(0, 700)))
        colour = [0, 0, 0]
        colour[rng.integers(3)] = int(rng.integers(60, 250))
        draw_ellipse(image, centre, axes, colour, angle)
    (plain,) = find_blobs([image])
    fits = (plain.boxes[:, 2:] - plain.boxes[:, :2] < 63).all(axis=1)
    assert fits.sum() > 30
    found = detect(image, size=256, overlap=0.25)
    ours = {tuple(box) for box in found.boxes.tolist()}
    assert len(ours) == len(found.boxes)
    assert ours >= {tuple(box) for box in plain.boxes[fits].tolist()}
    assert len(found.boxes) == len(plain.boxes)


def test_memory_beside_the_image_does_not_grow_with_it_and_the_work_does_in_proportion():
    peaks, counts = [], []
    for factor in (1, 4):
        image = np.zeros((512 * factor, 512 * factor, 3), np.uint8)
        image[100:120, 100:120] = image[300:330, 240:270] = 200
        seen = []
        tracemalloc.start()
        found = detect(image, functools.partial(find_blobs, seen=seen), size=128, overlap=0.2)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        counts.append(len(seen))
        assert len(found.scores) == 6
    assert peaks[1] < peaks[0] + 1_000_000  # a mask of the larger image has 4 MB
    assert counts[1] <= 16 * counts[0]


class _Cup(FakePredictor):
    """Finds a cup in the second of two tiles, and a piece of it in the first, which looks like a dog."""

    def _find(self, images):
        masks = np.ones((1, 28, 28), np.float32)
        found = ([50, 20, 64, 40], 0.6, 2), ([12, 20, 44, 40], 0.9, 1)
        for (box, score, label), image in zip(found, images, strict=True):
            assert image.shape == (64, 64, 3)
            yield Instances(np.float32([box]), np.float32([score]), np.int32([label]), masks)


def test_pieces_of_objects_of_unwanted_classes_are_not_taken_for_others():
    predictor, image = _Cup(), np.zeros((64, 100, 3), np.uint8)
    assert predictor.predict(image, tile=64).names == ["cup"]
    assert predictor.predict(image, tile=64, classes=["dog"]).names == []
    assert predictor.predict(image, tile=64, classes=["cup"]).boxes.tolist() == [[48, 20, 80, 40]]
