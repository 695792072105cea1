"""Images, masks and boxes move together; what training sees of them, and when."""

import itertools

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from maskrcnn_jax.data import augment
from maskrcnn_jax.data.augment import Placement, draw_placement, move_boxes, move_image, move_mask
from maskrcnn_jax.data.dataset import load_coco
from maskrcnn_jax.data.plan import buckets_for, training_buckets
from maskrcnn_jax.data.run_lengths import cut_out, decode_crop
from maskrcnn_jax.data.shapes import write_dataset
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.options import DataOptions
from tests.data.loading import load

TRAIN = {"batch_size": 4, "short_side": 96, "long_side": 128, "train": True, "annotations": True}
LSJ = {"crop_size": 64, "scale_jitter": (0.1, 2.0)}
EVERYTHING = LSJ | {"hflip": 0.5, "vflip": 0.5, "rotate90": 0.5, "rotation": 20.0, "copy_paste": 0.7}


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """22 images of shapes, 96 pixels a side."""
    root = tmp_path_factory.mktemp("data") / "shapes"
    write_dataset(root, num_train=22, num_val=1, image_size=96, seed=1)
    return load_coco(root, "train2017")


def full_mask(crop, size):
    mask = np.zeros(size, np.uint8)
    height, width = crop.mask.shape
    mask[crop.y : crop.y + height, crop.x : crop.x + width] = crop.mask
    return mask


def full_masks(batch, row):
    """The valid masks of an image in pixels of the network input, which is the raster of images that are moved."""
    size = tuple(batch.gt.mask_sizes[row].tolist())
    for k in np.flatnonzero(batch.gt.valid[row]):
        y, x, height, width = batch.gt.mask_windows[row, k].tolist()
        mask = np.zeros(size, np.uint8)
        cells = np.unpackbits(batch.gt.masks[row, k], axis=1, bitorder="little")
        mask[y : y + height, x : x + width] = cells[:height, :width]
        yield k, mask


def placed(image_size, size=None, *, hflip=False, vflip=False, turns=0, angle=0.0, window=None):
    size = size or (image_size[::-1] if turns % 2 else image_size)
    return Placement(image_size, hflip, vflip, turns, size, angle, window or (0, 0, *size))


# One affine map


@pytest.mark.parametrize(("hflip", "vflip", "turns"), [*itertools.product([False, True], [False, True], range(4))])
def test_flips_and_quarter_turns_move_every_pixel_exactly(hflip, vflip, turns):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (5, 8, 3), np.uint8)
    mask = np.zeros((5, 8), np.uint8)
    mask[1:3, 2:7] = rng.integers(0, 2, (2, 5))
    wanted = [image, mask]
    if hflip:
        wanted = [array[:, ::-1] for array in wanted]
    if vflip:
        wanted = [array[::-1] for array in wanted]
    wanted = [np.rot90(array, turns) for array in wanted]
    height, width = wanted[1].shape
    placement = placed((5, 8), hflip=hflip, vflip=vflip, turns=turns, window=(1, 2, height - 1, width - 2))
    moved = move_image(image, placement, "uint8", smooth=True)
    np.testing.assert_array_equal(moved, wanted[0][1:, 2:])
    crop = move_mask(cut_out(mask), placement.matrix, (height - 1, width - 2))
    np.testing.assert_array_equal(full_mask(crop, (height - 1, width - 2)), wanted[1][1:, 2:])


def test_a_box_is_mirrored_turned_resized_and_cropped():
    box = np.float32([[1, 2, 3, 6]])  # in an image 10 wide and 8 high
    for placement, wanted in [
        (placed((8, 10), hflip=True), [7, 2, 9, 6]),
        (placed((8, 10), vflip=True), [1, 2, 3, 6]),
        (placed((8, 10), turns=1), [2, 7, 6, 9]),  # counter-clockwise: the upper right corner comes to the upper left
        (placed((8, 10), (16, 30)), [3, 4, 9, 12]),
        (placed((8, 10), (16, 30), window=(5, 4, 6, 4)), [0, 0, 4, 6]),
        (placed((8, 10), turns=2, size=(4, 5), window=(1, 0, 3, 5)), [3.5, 0, 4.5, 2]),
    ]:
        moved = move_boxes(box, placement.matrix, placement.window[2:])
        np.testing.assert_allclose(moved, [wanted], atol=1e-5)
        assert moved.dtype == np.float32


def test_a_rotation_is_counter_clockwise_about_the_centre():
    matrix = placed((10, 10), angle=90.0).matrix
    np.testing.assert_allclose(matrix @ [9, 1, 1], [1, 1, 1], atol=1e-12)
    np.testing.assert_allclose(matrix, placed((10, 10), turns=1).matrix, atol=1e-12)
    # Half a right angle: the corners of a box lie 7.07 from the centre.
    box = move_boxes(np.float32([[2, 2, 8, 8]]), placed((10, 10), angle=45.0).matrix, (10, 10))
    np.testing.assert_allclose(box, [[5 - 18**0.5, 5 - 18**0.5, 5 + 18**0.5, 5 + 18**0.5]], rtol=1e-6)


def test_corners_that_a_rotation_uncovers_have_the_colour_that_normalisation_makes_zero():
    image = np.full((40, 60, 4), 255, np.uint8)
    moved = move_image(image, placed((40, 60), angle=30.0), "uint8", smooth=True)
    assert moved[0, 0].tolist() == list(augment.FILL)
    assert (moved[15:25, 20:40] == 255).all()


def test_reduced_images_are_smoothed_under_scale_jitter():
    stripes = np.tile(np.uint8([0, 255]), (20, 10))[..., None].repeat(3, axis=2)
    smooth, bare = (
        move_image(stripes, placed((20, 20), (5, 5)), "float32", smooth=smooth) for smooth in (True, False)
    )
    assert smooth.dtype == np.float32
    np.testing.assert_array_equal(smooth, np.full((5, 5, 3), 127.5))
    assert bare.shape == smooth.shape


def random_polygon(rng, size):
    """A star of 3 to 12 corners around a point of the image, part of it outside now and then."""
    height, width = size
    angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 13)))
    radius = rng.uniform(0.15, 0.5, len(angles)) * min(size)
    center = rng.uniform(0.2, 0.8, 2) * [width, height]
    return np.clip(center + radius[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1), 0, [width, height])


def rasterised(polygon, size):
    return coco_mask.merge(coco_mask.frPyObjects([polygon.ravel().tolist()], *size))


def distance(polygon, size):
    """Distances [h, w] of the centres of pixels from the outline of a polygon, in columns or rows."""
    points = np.stack(np.meshgrid(*(np.arange(n) + 0.5 for n in size[::-1])), axis=-1)[:, :, None]
    starts, steps = polygon, np.roll(polygon, -1, axis=0) - polygon
    along = ((points - starts) * steps).sum(axis=-1) / np.maximum((steps**2).sum(axis=-1), 1e-12)
    nearest = starts + np.clip(along, 0, 1)[..., None] * steps
    return np.abs(points - nearest).max(axis=-1).min(axis=-1)


TRANSFORMS = {
    "vertical flip": {"vflip": 1.0},
    "quarter turns": {"rotate90": 1.0},
    "small angles": {"rotation": 15.0},
    "crop": {"crop_size": 96},
    "a tenth": {"crop_size": 320, "scale_jitter": (0.1, 0.1)},
    "twice": {"crop_size": 120, "scale_jitter": (2.0, 2.0)},
    "jitter": {"crop_size": 120, "scale_jitter": (0.1, 2.0)},
    "everything": {"vflip": 0.5, "rotate90": 0.7, "rotation": 30.0, "crop_size": 120, "scale_jitter": (0.1, 2.0)},
    "everything but crops": {"vflip": 0.5, "rotate90": 0.7, "rotation": 30.0, "short_sides": (40, 80, 120)},
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("image_size", [(60, 90), (210, 150)])
def test_moved_masks_are_those_of_moved_polygons(name, image_size):
    """Apart from a border of one pixel of the image or of the network input, whichever is larger."""
    rng = np.random.default_rng(0)
    options = DataOptions(short_side=100, long_side=160, **{"hflip": 0.5} | TRANSFORMS[name])
    side = options.crop_size
    overlaps, shown = [], 0
    for _ in range(10):
        placement = draw_placement(image_size, options, (side, side) if side else (160, 160), rng)
        size, matrix = placement.window[2:], placement.matrix
        polygon = random_polygon(rng, image_size)
        found = full_mask(move_mask(decode_crop(rasterised(polygon, image_size)), matrix, size), size)
        corners = polygon @ matrix[:2, :2].T + matrix[:2, 2]
        wanted = coco_mask.decode(rasterised(corners, size))
        turned_height = image_size[placement.quarter_turns % 2]
        away = distance(corners, size) > max(1, placement.size[0] / turned_height)
        either = ((found | wanted) & away).sum()
        overlaps.append((found & wanted & away).sum() / either if either else 1.0)
        shown += bool((wanted & away).any())
    assert shown >= 5
    assert min(overlaps) >= 0.99


def test_an_image_and_its_masks_move_alike():
    """The image is white where the object is."""
    rng = np.random.default_rng(1)
    options = DataOptions(hflip=0.5, **TRANSFORMS["everything"])
    overlaps = []
    for _ in range(10):
        crop = decode_crop(rasterised(random_polygon(rng, (120, 200)), (120, 200)))
        image = np.repeat(255 * full_mask(crop, (120, 200))[..., None], 3, axis=2)
        placement = draw_placement((120, 200), options, (160, 160), rng)
        moved = move_image(image, placement, "uint8", smooth=True)
        size = placement.window[2:]
        assert moved.shape == (*size, 3)
        white = (moved >= 128).all(axis=2)
        mask = full_mask(move_mask(crop, placement.matrix, size), size)
        if mask.sum() > 400:
            overlaps.append((white & mask).sum() / (white | mask).sum())
    assert len(overlaps) >= 4
    assert min(overlaps) > 0.93
    assert np.mean(overlaps) > 0.97


# Draws


@pytest.mark.parametrize(
    ("scale", "resize", "size", "kept"),
    [
        (2.0, "uint8", (1536, 2048), (1024, 1024)),  # 1024 / 640 = 1.6; 480 * 3.2 = 1536
        (1.0, "uint8", (768, 1024), (768, 1024)),
        (0.1, "uint8", (76, 102), (76, 102)),  # 76.8 and 102.4, floored as in torchvision
        (0.1, "pillow", (77, 102), (77, 102)),  # rounded as in detectron2
    ],
)
def test_scale_jitter_resizes_to_the_crop_times_the_factor(scale, resize, size, kept):
    options = DataOptions(crop_size=1024, scale_jitter=(scale, scale), resize=resize)
    placement = draw_placement((480, 640), options, (1024, 1024), np.random.default_rng(0))
    assert placement.size == size
    assert placement.window[2:] == kept


def test_factors_and_places_of_the_crop_cover_their_ranges():
    rng = np.random.default_rng(0)
    options = DataOptions(crop_size=100, scale_jitter=(0.1, 2.0))
    drawn = [draw_placement((50, 100), options, (100, 100), rng) for _ in range(2000)]
    factors = np.array([placement.size[1] / 100 for placement in drawn])
    assert 0.1 <= factors.min() < 0.12 and 1.97 < factors.max() <= 2.0
    assert abs(factors.mean() - 1.05) < 0.04
    assert abs(np.mean([p.hflip for p in drawn]) - 0.5) < 0.05
    assert not any(p.vflip or p.quarter_turns or p.angle for p in drawn)
    for placement in drawn:
        y, x, height, width = placement.window
        assert 0 <= y <= placement.size[0] - height and 0 <= x <= placement.size[1] - width
    options = DataOptions(crop_size=2, short_side=4, long_side=4)
    places = {draw_placement((4, 4), options, (2, 2), rng).window[:2] for _ in range(200)}
    assert places == set(itertools.product(range(3), range(3))), "crops lie on a diagonal"


def test_an_image_that_lies_after_a_turn_is_reduced_to_the_padded_size_of_its_batch():
    options = DataOptions(rotate90=1.0, short_side=60, long_side=90)
    drawn = [draw_placement((60, 90), options, (64, 96), np.random.default_rng(i)) for i in range(20)]
    assert {placement.size for placement in drawn} == {(64, 42), (60, 90)}  # 60 * 64 / 90 = 42.7
    assert {placement.quarter_turns for placement in drawn} == {1, 2, 3}


# Batches


def test_boxes_are_those_of_the_masks_in_sight(index):
    batches = list(load(index, **TRAIN | EVERYTHING, num_steps=12))
    seen = 0
    for batch in batches:
        assert batch.images.shape[1:3] == (64, 64), "one static shape"
        for row in range(4):
            assert (batch.sizes[row] == batch.gt.mask_sizes[row]).all()
            for k, mask in full_masks(batch, row):
                rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
                tight = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
                assert batch.gt.boxes[row, k].tolist() == tight
                seen += 1
    assert seen > 50


@pytest.mark.parametrize("setting", [{"threads": 4}, pytest.param({"workers": 1}, marks=pytest.mark.slow)])
def test_augmentation_depends_on_seed_epoch_and_place_alone(index, setting):
    shared = TRAIN | EVERYTHING | {"color_jitter": 0.2, "repeat_threshold": 0.9, "threads": 1}
    whole = list(load(index, **shared, num_steps=11))
    rest = list(load(index, **shared | setting, num_steps=11, start_step=7))
    halves = [list(load(index, **shared, num_steps=11, process_index=p, process_count=2)) for p in (0, 1)]
    other = list(load(index, **shared, num_steps=11, seed=1))
    assert len(rest) == 4
    for k, batch in enumerate(whole):
        arrays = [a for a in [*batch[:-1], *batch.gt] if a is not None]
        split = [[a for a in [*half[k][:-1], *half[k].gt] if a is not None] for half in halves]
        for x, *parts in zip(arrays, *split, strict=True):
            np.testing.assert_array_equal(x, np.concatenate(parts))
        if k >= 7:
            for x, y in zip(arrays, [a for a in [*rest[k - 7][:-1], *rest[k - 7].gt] if a is not None], strict=True):
                np.testing.assert_array_equal(x, y)
    assert any((a.images != b.images).any() for a, b in zip(whole, other, strict=True))


def test_evaluation_is_not_augmented(index):
    settings = TRAIN | {"train": False}
    plain = list(load(index, **settings))
    for sizes in ({}, {"scale_jitter": (), "short_sides": (64,)}):
        augmented = list(load(index, **settings | EVERYTHING | sizes, color_jitter=0.5, repeat_threshold=1.0))
        for a, b in zip(plain, augmented, strict=True):
            np.testing.assert_array_equal(a.images, b.images)
            np.testing.assert_array_equal(a.gt.masks, b.gt.masks)


def test_the_shorter_side_is_drawn_and_batches_are_padded_for_the_longest(index):
    sides = (40, 56, 96)
    batches = list(load(index, **TRAIN | {"short_side": 64, "long_side": 96, "short_sides": sides}, num_steps=12))
    assert {tuple(size) for batch in batches for size in batch.sizes.tolist()} == {(side, side) for side in sides}
    assert {batch.images.shape[1:3] for batch in batches} == {(96, 96)}


def test_crops_alone_are_parts_of_the_resized_image(index):
    batch = next(iter(load(index, **TRAIN | {"crop_size": 40})))
    assert batch.images.shape[1:3] == (64, 64)
    assert batch.sizes.tolist() == [[40, 40]] * 4
    for row in range(4):
        whole = index.read_image(batch.image_index[row])
        windows = np.lib.stride_tricks.sliding_window_view(whole, (40, 40, 3))[:, :, 0]
        assert (windows == batch.images[row, :40, :40]).all(axis=(2, 3, 4)).any()
        assert not batch.images[row, 40:].any()
    options = DataOptions(crop_size=40, short_side=800, short_sides=(640, 900), long_side=1333)
    assert training_buckets(options) == [(64, 64)]
    assert buckets_for(options)[0] == (800, 1088), "evaluation and prediction see whole images"


def test_objects_without_masks_get_the_box_around_their_turned_corners(dataset):
    objects = [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 6, 8, 4]}]
    index = load_coco(dataset.write([(24, 32)], objects), "train2017")
    settings = TRAIN | {"batch_size": 1, "short_side": 24, "long_side": 32}
    batch = next(iter(load(index, **settings, vflip=1.0)))
    assert batch.gt.boxes[0, 0].tolist() == [10, 14, 18, 18]
    batch = next(iter(load(index, **settings, rotation=20.0)))
    width, height = batch.gt.boxes[0, 0, 2:] - batch.gt.boxes[0, 0, :2]
    assert batch.gt.valid[0, 0] and width > 8 and height > 4


def test_only_objects_in_sight_are_counted_where_their_number_is_limited(dataset):
    square = {"category_id": 1, "iscrowd": 0, "area": 16}
    objects = [
        {"id": i, "image_id": 1, "bbox": [x, 4, 4, 4], "segmentation": [[x, 4, x + 4, 4, x + 4, 8, x, 8]]} | square
        for i, x in enumerate(range(0, 320, 5), 1)
    ]
    index = load_coco(dataset.write([(32, 320)], objects), "train2017")
    settings = TRAIN | {"batch_size": 1, "short_side": 32, "long_side": 320, "crop_size": 32, "max_objects": 16}
    for batch in load(index, **settings, num_steps=10):
        assert 6 <= batch.gt.valid.sum() <= 8, "a crop shows seven, of sixty-four"


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ({"scale_jitter": (0.1, 2.0)}, "set data.crop_size as well"),
        ({"scale_jitter": (0.1,), "crop_size": 64}, "use two positive factors"),
        ({"scale_jitter": (0, 2.0), "crop_size": 64}, "use two positive factors"),
        ({"scale_jitter": (2.0, 0.1), "crop_size": 64}, "use two positive factors"),
        ({"short_sides": (64, 200)}, "use values up to data.long_side, 128"),
        ({"short_sides": (0, 64)}, "use a tuple of whole numbers from 1"),
        (LSJ | {"short_sides": (64, 96)}, r"set one of them to \(\)"),
        ({"copy_paste": 1.5}, "copy_paste is 1.5; use a value from 0 to 1"),
    ],
)
def test_augmentation_that_makes_no_sense_is_refused(index, setting, told):
    with pytest.raises(UserError, match=told):
        load(index, **TRAIN | setting)
