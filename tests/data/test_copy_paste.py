"""Objects pasted over an image: what is hidden, what is dropped, what is never pasted."""

import logging

import cv2
import numpy as np
import pytest

from maskrcnn_jax.data import copy_paste
from maskrcnn_jax.data import loader as loader_module
from maskrcnn_jax.data.dataset import load_coco
from maskrcnn_jax.data.images import BrokenImageError
from maskrcnn_jax.options import DataOptions
from tests.data.loading import load

TRAIN = {"batch_size": 1, "short_side": 40, "long_side": 60, "train": True, "annotations": True, "threads": 1}


def square(i, image, x, y, side, **fields):
    corners = [x, y, x + side, y, x + side, y + side, x, y + side]
    return {
        "id": i,
        "image_id": image,
        "category_id": 1,
        "iscrowd": 0,
        "area": side**2,
        "bbox": [x, y, side, side],
        "segmentation": [corners],
    } | fields


@pytest.fixture
def pasted(dataset, monkeypatch):
    """Return the batch of a black image over which all chosen objects of a white one are pasted."""
    monkeypatch.setattr(copy_paste, "SHARE", 1.0)

    def load_pair(objects, sizes=((40, 60), (40, 60)), **settings):
        root = dataset.write(sizes, objects)
        for i, (size, value) in enumerate(zip(sizes, (0, 255), strict=True), 1):
            cv2.imwrite(str(dataset.image_path(f"{i}.jpg")), np.full((*size, 3), value, np.uint8))
        index = load_coco(root, "train2017", keep_unlisted=True)
        reader = load(index, **TRAIN | {"copy_paste": 1.0, "image_indices": [0]} | settings)._read
        object.__setattr__(reader, "image_indices", np.array([1]))  # the images to paste from
        batch = reader(0)
        assert not isinstance(batch, Exception), batch
        return batch

    return load_pair


def mask_of(batch, k):
    y, x, height, width = batch.gt.mask_windows[0, k].tolist()
    mask = np.zeros(batch.gt.mask_sizes[0], bool)
    cells = np.unpackbits(batch.gt.masks[0, k], axis=1, bitorder="little")
    mask[y : y + height, x : x + width] = cells[:height, :width]
    return mask


def test_pasted_objects_cut_what_lies_below(pasted):
    batch = pasted([square(1, 1, 10, 10, 10), square(2, 2, 15, 5, 10, category_id=2)])
    assert batch.gt.valid[0].tolist() == [True, True] + [False] * 6
    assert batch.gt.labels[0, :2].tolist() == [1, 2]
    assert batch.gt.boxes[0, :2].tolist() == [[10, 10, 20, 20], [15, 5, 25, 15]]
    below, above = mask_of(batch, 0), mask_of(batch, 1)
    assert (below.sum(), above.sum()) == (75, 100), "a quarter of the lower square is covered"
    assert not (below & above).any()
    np.testing.assert_array_equal(batch.images[0, :40, :60] > 128, above[..., None].repeat(3, axis=2))


def test_the_box_of_what_is_left_is_recomputed(pasted):
    batch = pasted([square(1, 1, 10, 10, 10), square(2, 2, 5, 5, 10), square(3, 2, 5, 15, 10)])
    assert batch.gt.boxes[0, 0].tolist() == [15, 10, 20, 20], "its left half is covered"
    assert mask_of(batch, 0).sum() == 50


def test_an_object_of_which_nothing_is_left_is_dropped(pasted):
    batch = pasted([square(1, 1, 10, 10, 10), square(2, 1, 30, 10, 8), square(3, 2, 8, 8, 14)])
    assert batch.gt.valid[0, :3].tolist() == [False, True, True]


def test_objects_without_masks_keep_their_boxes_until_covered_and_are_not_pasted(pasted):
    box = {"segmentation": []}
    objects = [square(1, 1, 10, 10, 10, **box), square(2, 1, 30, 10, 8, **box), square(3, 2, 9, 9, 12)]
    batch = pasted([*objects, square(4, 2, 28, 8, 9, **box)])
    assert batch.gt.valid[0].tolist() == [False, True, True] + [False] * 5
    assert batch.gt.boxes[0, 1].tolist() == [30, 10, 38, 18]
    assert batch.gt.has_mask[0, :3].tolist() == [False, False, True]
    half = pasted([*objects[:1], square(3, 2, 9, 9, 5)])
    assert half.gt.boxes[0, 0].tolist() == [10, 10, 20, 20]


def test_regions_are_cut_like_objects_and_are_not_pasted(pasted):
    objects = [
        square(1, 1, 10, 10, 10, category_id=99),
        square(2, 1, 30, 10, 8, iscrowd=1),
        square(3, 2, 5, 5, 10),
        square(4, 2, 30, 25, 10, category_id=99),
    ]
    batch = pasted(objects, ignore_regions=True)
    assert batch.gt.ignored[0, :4].tolist() == [True, True, False, False]
    assert batch.gt.valid[0, :4].tolist() == [False, False, True, False]
    assert mask_of(batch, 0).sum() == 75
    assert pasted(objects).gt.valid[0].sum() == 1
    hidden = pasted([*objects[:2], square(3, 2, 5, 5, 20)], ignore_regions=True)
    assert hidden.gt.ignored[0, :3].tolist() == [False, True, False]


def test_an_image_grows_to_hold_what_is_pasted_beyond_its_border(pasted):
    batch = pasted(
        [square(1, 1, 4, 4, 8), square(2, 2, 45, 5, 10)], sizes=((20, 20), (20, 60)), crop_size=60, short_side=20
    )
    assert batch.sizes.tolist() == [[20, 55]]
    assert batch.gt.boxes[0, :2].tolist() == [[4, 4, 12, 12], [45, 5, 55, 15]]
    assert batch.images[0, 0, 30].tolist() == [124, 116, 104], "between them it has the mean colour"
    assert not batch.images[0, 20:].any() and not batch.images[0, :, 55:].any()


def test_an_image_does_not_grow_for_what_vanishes_when_it_is_pasted(pasted):
    line = [101, 500, 102, 500, 102, 520, 101, 520]  # beyond the lower image, and too thin for a tenth of the size
    objects = [square(1, 1, 4, 4, 8), square(2, 2, 0, 0, 1, bbox=[101, 500, 1, 20], segmentation=[line])]
    batch = pasted(objects, sizes=((20, 20), (600, 200)), crop_size=60, short_side=20)
    assert batch.sizes.tolist() == [[20, 20]]
    assert batch.gt.valid[0].tolist() == [True] + [False] * 7


def test_there_is_room_for_the_objects_of_most_images_besides(pasted):
    objects = [square(i, 1 + i // 12, 5 * (i % 6), 10, 4) for i in range(1, 24)]  # 11 and 12 objects
    batch = pasted(objects)
    assert batch.gt.valid.shape == (1, 24)
    limited = pasted(objects, max_objects=16)
    assert limited.gt.valid.shape == (1, 16)
    assert limited.gt.valid.sum() <= 16


def test_half_of_the_objects_are_pasted_over_the_share_of_images_asked_for(dataset):
    squares = [square(1 + i, 1 + i // 9, 6 * (i % 9), 5 + 15 * (i // 9), 4) for i in range(18)]
    index = load_coco(dataset.write([(40, 60)] * 2, squares), "train2017")
    counts = []
    for seed in range(150):
        settings = {"canvas": (64, 64), "channels": 3, "max_objects": 24, "donors": np.array([1]), "skips": bool}
        options = DataOptions(short_side=40, long_side=60, hflip=0.0, copy_paste=0.7)
        scene = copy_paste.draw_scene(index, 0, options, **settings, rng=np.random.default_rng(seed))
        counts.append(len(scene.objects.ids) - 9)
    assert 0.6 < np.mean(np.greater(counts, 0)) < 0.8
    assert 4 < np.mean([count for count in counts if count]) < 5
    assert max(counts) > 6


def test_a_dataset_without_masks_has_nothing_to_paste(dataset, caplog):
    objects = [square(1, 1, 5, 5, 9, segmentation=[]), square(2, 1, 9, 9, 9, iscrowd=1)]
    index = load_coco(dataset.write([(40, 60)], objects), "train2017")
    loader_module._warn.cache_clear()
    for settings in ({"train": False}, {"copy_paste": 0.0}, {}):
        caplog.clear()
        load(index, **TRAIN | {"copy_paste": 1.0} | settings)
        assert ("data.copy_paste pastes nothing" in caplog.text) == (not settings)


@pytest.mark.parametrize("skip", [False, True])
def test_a_broken_second_image_stops_training_or_is_skipped_with_a_warning(dataset, skip, caplog):
    index = load_coco(dataset.write([(40, 60)] * 2, [square(1, 1, 5, 5, 9), square(2, 2, 9, 9, 9)]), "train2017")
    dataset.image_path("2.jpg").write_bytes(b"no image")
    loader_module._warn.cache_clear()
    reader = load(index, **TRAIN | {"copy_paste": 1.0, "skip_broken": skip})._read
    object.__setattr__(reader, "image_indices", np.array([1]))
    batches = [reader(step) for step in range(12)]
    if not skip:
        assert any(isinstance(batch, BrokenImageError) for batch in batches)
        return
    rows = [batch.image_index[0] for batch in batches]
    assert set(rows) == {0, -1}, "an image does not vanish because what was to be pasted cannot be read"
    with caplog.at_level(logging.WARNING):
        assert caplog.text.count("2.jpg") == 1
