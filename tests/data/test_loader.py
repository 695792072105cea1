import dataclasses
import functools
import itertools
import json
import logging
import multiprocessing
import time
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pycocotools import mask as coco_mask

from maskrcnn_jax.data import loader as loader_module
from maskrcnn_jax.data import transforms
from maskrcnn_jax.data.coco import drop_labels
from maskrcnn_jax.data.dataset import load_coco
from maskrcnn_jax.data.findings import Kind
from maskrcnn_jax.data.images import BrokenImageError
from maskrcnn_jax.data.loader import mask_side
from maskrcnn_jax.data.plan import Plan, buckets_for, training_subset
from maskrcnn_jax.data.run_lengths import decode_crop
from maskrcnn_jax.data.shapes import write_dataset
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.ops.masks import mask_targets
from maskrcnn_jax.options import DataOptions
from tests.children import PATIENCE
from tests.data.loading import load

TRAIN = {"batch_size": 4, "short_side": 96, "long_side": 128, "train": True, "annotations": True}
EVALUATE = TRAIN | {"train": False, "annotations": False}


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """22 images of shapes, 96 pixels a side."""
    root = tmp_path_factory.mktemp("data") / "shapes"
    write_dataset(root, num_train=22, num_val=1, image_size=96, seed=1)
    return load_coco(root, "train2017")


@pytest.fixture
def mixed(dataset):
    """7 wide, 5 tall and 2 square images, with one object in every wide one."""
    square = {"bbox": [4, 2, 8, 6], "segmentation": [[4, 2, 12, 2, 12, 8, 4, 8]]}
    annotations = [{"id": i, "image_id": i, "category_id": 2, "iscrowd": 0, "area": 48} | square for i in range(1, 8)]
    return load_coco(dataset.write([(24, 32)] * 7 + [(32, 24)] * 5 + [(24, 24)] * 2, annotations), "train2017")


def assert_equal_batches(first, second):
    first, second = list(first), list(second)
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        leaves_a, leaves_b = (list(batch[:-1]) + list(batch.gt or ()) for batch in (a, b))
        assert len(leaves_a) == len(leaves_b)
        for x, y in zip(leaves_a, leaves_b, strict=True):
            if x is None:
                assert y is None
                continue
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y)


# Contents of a batch


def test_a_bucket_with_fewer_images_than_a_batch_repeats_them(mixed):
    plan = Plan(mixed.sizes, np.arange(14), batch_size=12, buckets=[(24, 32), (32, 24)], shuffle=True, seed=0)
    rows = {bucket: images for images, bucket in map(plan.step, range(plan.steps_per_epoch))}
    assert set(rows[32, 24]) == {7, 8, 9, 10, 11}
    assert len(rows[32, 24]) == 12


def test_smaller_training_subsets_are_part_of_larger_ones(index):
    small, large = training_subset(index, 5, seed=2), training_subset(index, 12, seed=2)
    assert len(small) == 5
    assert len(large) == 12
    assert set(small) < set(large)
    assert set(small) != set(training_subset(index, 5, seed=3))
    assert training_subset(index, 0, seed=2).tolist() == training_subset(index, 99, seed=2).tolist() == list(range(22))


def test_a_batch_holds_the_resized_image_its_sizes_and_its_objects(mixed):
    batches = load(mixed, **TRAIN | {"batch_size": 2, "train": False, "short_side": 48, "long_side": 64})
    batch = next(iter(batches))
    assert batch.images.shape == (2, 64, 64, 3)
    assert batch.images.dtype == np.uint8
    resized = transforms.resize_image(mixed.read_image(1), (48, 64), "uint8")
    np.testing.assert_array_equal(batch.images[1, :48], resized)
    assert not batch.images[1, 48:].any()
    assert batch.sizes.tolist() == [[48, 64]] * 2
    assert batch.original_sizes.tolist() == [[24, 32]] * 2
    assert batch.image_index.tolist() == [0, 1]
    assert batch.valid.tolist() == [True, True]
    gt = batch.gt
    assert gt.boxes.shape == (2, 8, 4)
    assert gt.valid.tolist() == [[True] + [False] * 7] * 2
    assert gt.boxes[0, 0].tolist() == [8, 4, 24, 16]
    assert gt.labels[0, 0] == 2
    assert gt.masks.shape == (2, 8, 16, 2), "the objects have 8 pixels, and one more at either side"
    assert gt.mask_sizes.tolist() == [[24, 32]] * 2
    assert gt.mask_windows[0, 0].tolist() == [2, 4, 6, 8]
    mask = np.unpackbits(gt.masks[0, 0], axis=1, bitorder="little")
    assert mask[:6, :8].all()
    assert mask.sum() == 48


def test_the_dtypes_are_those_that_the_structures_promise(index):
    batch = next(iter(load(index, **TRAIN)))
    assert [x.dtype.name for x in batch[:-1]] == ["uint8", "int32", "int32", "int32", "bool"]
    assert [x.dtype.name for x in batch.gt[:6]] == ["float32", "int32", "uint8", "int32", "int32", "bool"]
    assert batch.gt[6:] == (None, None), "every object has a mask, and regions are not wanted"
    batch = next(iter(load(index, **TRAIN | {"resize": "float32"})))
    assert batch.images.dtype == np.float32
    assert 1 < batch.images.max() <= 255


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_objects_without_masks_and_regions_are_marked(dataset, workers):
    square = {"bbox": [4, 2, 8, 6], "segmentation": [[4, 2, 12, 2, 12, 8, 4, 8]], "iscrowd": 0, "area": 48}
    annotations = [
        {"id": 1, "image_id": 1, "category_id": 2} | square,
        {"id": 2, "image_id": 1, "category_id": 1} | square | {"segmentation": []},
        {"id": 3, "image_id": 1, "category_id": 2} | square | {"iscrowd": 1, "bbox": [8, 2, 8, 6]},
        {"id": 4, "image_id": 1, "category_id": 99} | square | {"bbox": [16, 2, 8, 6]},
        {"id": 5, "image_id": 2, "category_id": 1} | square,
    ]
    index = load_coco(dataset.write([(24, 32)] * 2, annotations), "train2017", keep_unlisted=True)
    settings = TRAIN | {"batch_size": 2, "train": False, "short_side": 24, "long_side": 32, "workers": workers}
    (plain,) = load(index, **settings)
    assert plain.gt.ignored is None
    assert plain.gt.valid.sum(axis=1).tolist() == [2, 1]
    assert plain.gt.has_mask[plain.gt.valid].tolist() == [True, False, True]
    assert plain.gt.masks.any(axis=(2, 3))[0, :2].tolist() == [True, False]
    (batch,) = load(index, ignore_regions=True, **settings)
    assert batch.gt.valid[0, :4].tolist() == [True, True, False, False]
    assert batch.gt.ignored[0, :4].tolist() == [False, False, True, True]
    assert batch.gt.boxes[0, 2:4, 0].tolist() == [8, 16]
    assert not batch.gt.ignored[1].any()
    (of_others,) = load(drop_labels(index, 1, seed=0), ignore_regions=True, **settings)
    assert not (of_others.gt.valid | of_others.gt.ignored).any()


def test_images_are_mirrored_together_with_their_objects(mixed):
    shared = TRAIN | {"batch_size": 2, "short_side": 48, "long_side": 64, "image_indices": [0, 3]}
    plain, mirrored = (next(iter(load(mixed, **shared, hflip=p))) for p in (0.0, 1.0))
    np.testing.assert_array_equal(mirrored.images[:, :48], plain.images[:, :48, ::-1])
    assert mirrored.gt.boxes[0, 0].tolist() == [40, 4, 56, 16]  # the image is twice as large as its file
    assert mirrored.gt.mask_windows[0, 0].tolist() == [2, 20, 6, 8]
    assert np.unpackbits(mirrored.gt.masks[0, 0]).sum() == 48


@pytest.mark.parametrize("side", [1e-30, 1e-14, 1e-6, 1e-4, 1e-3])
@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_a_sliver_has_an_area_in_the_batch_or_is_no_object(dataset, side, flip):
    boxes = [[x, y, *size] for x in (0, 1 / 3, 13.7, 21) for y in (0, 5.3, 11) for size in ((side, 3), (3, side))]
    boxes.append([1, 1, 9, 9])
    objects = [{"id": i, "image_id": 1, "category_id": 1, "bbox": box} for i, box in enumerate(boxes, 1)]
    index = load_coco(dataset.write([(16, 24)], objects), "train2017")
    kept = index.annotations(0).ids.tolist()
    assert kept == (list(range(1, 26)) if side >= 1e-4 else [25])
    assert index.problems.get(Kind.FLAT_BOX, 0) == 25 - len(kept)
    for short in (5, 16, 37, 800):
        settings = {"batch_size": 1, "short_side": short, "long_side": 2000, "hflip": flip}
        batch = next(iter(load(index, **TRAIN | settings)))
        boxes = batch.gt.boxes[batch.gt.valid]
        assert len(boxes) == len(kept) and (boxes[:, 2:] > boxes[:, :2]).all()


def test_a_box_that_loses_its_area_when_it_is_scaled_is_no_object(index):
    thin = np.float32([[1.9999999, 2, 2, 8]]).repeat(len(index.boxes), axis=0)  # the smallest step there is
    settings = TRAIN | {"short_side": 23, "long_side": 64, "hflip": 1.0}
    for batch in load(dataclasses.replace(index, boxes=thin), **settings):
        boxes = batch.gt.boxes[batch.gt.valid]
        assert (boxes[:, 2:] > boxes[:, :2]).all()


def test_augmentation_differs_from_image_to_image_and_from_epoch_to_epoch(mixed):
    shared = TRAIN | {
        "short_side": 24,
        "long_side": 32,
        "image_indices": [0],
        "batch_size": 4,
        "num_steps": 6,
        "hflip": 0.5,
    }
    batches = list(load(mixed, **shared))
    flipped = [(batch.gt.boxes[:, 0, 0] == 20).tolist() for batch in batches]
    assert len({tuple(f) for f in flipped}) > 2
    jittered = next(iter(load(mixed, **shared | {"hflip": 0.0, "color_jitter": 0.3})))
    assert len({image.tobytes() for image in jittered.images}) == 4


def test_objects_come_without_augmentation_or_shuffling_too(index):
    batches = list(load(index, **EVALUATE | {"annotations": True}))
    for batch in batches:
        for row in np.flatnonzero(batch.valid):
            objects = index.annotations(batch.image_index[row])
            np.testing.assert_array_equal(batch.gt.boxes[row][batch.gt.valid[row]], objects.boxes)


def test_evaluation_sees_every_image_once_and_marks_the_rows_that_fill_up(mixed):
    batches = list(load(mixed, **EVALUATE | {"short_side": 24, "long_side": 64}))
    valid = np.concatenate([batch.valid for batch in batches])
    rows = np.concatenate([batch.image_index for batch in batches])
    assert sorted(rows[valid]) == list(range(14))
    assert (rows[~valid] == -1).all()
    assert (~valid).sum() > 0
    assert all(batch.gt is None and not batch.images[~batch.valid].any() for batch in batches)


def test_only_the_images_asked_for_take_part(index):
    batches = list(load(index, **EVALUATE, image_indices=[3, 5, 11, 12, 20]))
    assert [i for batch in batches for i in batch.image_index[batch.valid]] == [3, 5, 11, 12, 20]


# Order, processes, threads


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(index):
    shared = TRAIN | {"hflip": 0.5, "color_jitter": 0.2}
    first, again, other = (list(load(index, **shared, seed=seed)) for seed in (0, 0, 1))
    assert_equal_batches(first, again)
    with pytest.raises(AssertionError):
        assert_equal_batches(first, other)


@pytest.mark.parametrize("setting", [{"threads": 4}, {"prefetch": 1}, {"workers": 1}, {"workers": 2, "threads": 1}])
def test_threads_and_workers_change_no_byte(index, setting):
    shared = TRAIN | {"hflip": 0.5, "color_jitter": 0.2, "num_steps": 9}
    assert_equal_batches(load(index, **shared | {"threads": 1}), load(index, **shared | {"threads": 2} | setting))


@pytest.mark.parametrize("start", [1, 5, 6, 11])
def test_starting_at_a_step_gives_the_rest_of_the_run(index, start):
    shared = TRAIN | {"hflip": 0.5, "color_jitter": 0.2, "num_steps": 14}
    batches = load(index, **shared, start_step=start)
    assert batches.steps_per_epoch == 6
    assert len(batches) == 14 - start
    assert_equal_batches(batches, list(load(index, **shared))[start:])


def test_what_follows_a_step_inside_an_epoch_does_not_depend_on_workers_and_processes(index):
    shared = TRAIN | {"hflip": 0.5, "color_jitter": 0.2, "num_steps": 14}
    rest = list(load(index, **shared))[8:]  # from the third step of the second epoch
    shared["start_step"] = 8
    assert_equal_batches(load(index, **shared, workers=2, threads=1), rest)
    halves = [load(index, **shared, process_index=p, process_count=2) for p in (0, 1)]
    for whole, *parts in zip(rest, *halves, strict=True):
        for name in ("images", "image_index"):
            joined = np.concatenate([getattr(part, name) for part in parts])
            np.testing.assert_array_equal(getattr(whole, name), joined)


def test_a_run_that_is_over_yields_nothing(index):
    assert list(load(index, **TRAIN, num_steps=3, start_step=3)) == []


def test_every_iteration_starts_again(index):
    batches = load(index, **TRAIN, num_steps=3)
    assert_equal_batches(itertools.islice(batches, 2), list(batches)[:2])


def test_in_training_the_rows_of_two_processes_together_are_the_batch_of_one(index):
    whole = list(load(index, **TRAIN, hflip=0.5))
    halves = [list(load(index, **TRAIN, hflip=0.5, process_index=p, process_count=2)) for p in (0, 1)]
    for batch, first, second in zip(whole, *halves, strict=True):
        for x, y, z in zip(batch[:-1], first[:-1], second[:-1], strict=True):
            assert len(y) == len(z) == 2
            np.testing.assert_array_equal(x, np.concatenate([y, z]))
        for x, y, z in zip(batch.gt[:5], first.gt[:5], second.gt[:5], strict=True):
            np.testing.assert_array_equal(x, np.concatenate([y, z]))


def test_in_evaluation_three_processes_take_turns_at_the_batches_of_one(index):
    settings = EVALUATE | {"batch_size": 2}
    whole = list(load(index, **settings))
    shares = [load(index, **settings, process_index=p, process_count=3) for p in range(3)]
    assert sum(share.num_images for share in shares) == len(index)
    for process, share in enumerate(shares):
        assert_equal_batches(share, whole[process::3])
        assert share.num_images == sum(int(batch.valid.sum()) for batch in share)


# What goes wrong


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_reaches_the_consumer_by_name(dataset, workers):
    index = load_coco(dataset.write([(24, 32)] * 6), "train2017")
    dataset.image_path("5.jpg").write_bytes(b"no image")
    batches = iter(load(index, **EVALUATE | {"batch_size": 2}, workers=workers))
    assert next(batches).image_index.tolist() == [0, 1]
    next(batches)
    with pytest.raises(BrokenImageError, match=r"5.jpg is not an image .*skip_broken=true to train without it$"):
        next(batches)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_that_is_killed_is_an_error_that_says_what_to_do(index, workers):
    batches = iter(load(index, **TRAIN, num_steps=1000, workers=workers, threads=1))
    next(batches)
    multiprocessing.active_children()[0].kill()
    began = time.perf_counter()
    with pytest.raises(UserError, match="process that loads images died.*data.workers"):
        for _ in batches:
            pass
    assert time.perf_counter() - began < PATIENCE / 10, "it waited for the dead worker"
    assert not multiprocessing.active_children()


def test_skipped_images_are_invalid_rows_and_logged_once(dataset, caplog):
    index = load_coco(dataset.write([(24, 32)] * 4), "train2017")
    dataset.image_path("2.jpg").unlink()
    loader_module._warn.cache_clear()
    settings = TRAIN | {"num_steps": 3, "skip_broken": True}
    with caplog.at_level(logging.WARNING):
        batches = list(load(index, **settings))
    for batch in batches:
        assert batch.valid.sum() == 3
        assert sorted(batch.image_index) == [-1, 0, 2, 3]
        assert not batch.images[~batch.valid].any()
        assert not batch.gt.valid[~batch.valid].any()
    assert len(caplog.records) == 1
    assert "2.jpg" in caplog.text


def test_a_mask_that_does_not_fit_reaches_the_consumer(dataset):
    rle = {"size": [24, 32], "counts": [10, 30, 728]}
    fields = {"id": 5, "image_id": 1, "category_id": 1, "bbox": [1, 1, 5, 5], "segmentation": rle}
    index = load_coco(dataset.write([(24, 32)], [fields]), "train2017")
    longer = coco_mask.frPyObjects({"size": [90, 90], "counts": [10, 9000, 2]}, 90, 90)["counts"]
    counts = np.frombuffer(longer, np.uint8)
    index = dataclasses.replace(index, rle_counts=counts, rle_offsets=np.array([0, len(counts)]))
    with pytest.raises(UserError, match="annotation 5"):
        list(load(index, **TRAIN))


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ({"image_indices": []}, "no images to load; check data.train_split"),
        ({"process_count": 3}, "with 3 processes; use a multiple of 3"),
        ({"max_objects": -1}, "max_objects is -1"),
        ({"resize": "float64"}, "uint8, float32, pillow"),
        ({"hflip": 1.5}, "hflip is 1.5; use a value from 0 to 1"),
        ({"color_jitter": -1}, "color_jitter is -1"),
        ({"threads": 0}, "threads"),
        ({"buckets": "some"}, "auto, exact"),
        ({"short_side": 800, "long_side": 700}, "short_side is 800; use at most"),
    ],
)
def test_settings_that_make_no_sense_are_refused(index, setting, told):
    with pytest.raises(UserError, match=told):
        load(index, **TRAIN | setting)


def test_on_coco_boxes_and_masks_agree_in_every_batch(coco_dir):
    index = load_coco(coco_dir, "val2017")
    settings = {
        "batch_size": 4,
        "short_side": 800,
        "long_side": 1333,
        "train": True,
        "annotations": True,
        "hflip": 0.5,
    }
    close = []
    for batch in load(index, **settings, num_steps=6, threads=2):
        assert batch.images.shape[1:3] in buckets_for(DataOptions(short_side=800, long_side=1333))
        for row, k in np.argwhere(batch.gt.valid):
            height, width = batch.gt.mask_sizes[row]
            y, x, h, w = batch.gt.mask_windows[row, k]
            if not h * w:
                continue  # COCO has objects thinner than a pixel
            scale = batch.sizes[row][[1, 0, 1, 0]] / np.array([width, height, width, height])
            tight = np.array([x, y, x + w, y + h]) * scale
            close.append(np.abs(batch.gt.boxes[row, k] - tight).max() < 2.5 * scale.max())
    assert len(close) > 50
    assert np.mean(close) > 0.95


def read_batch(index):
    """Return the first batch of one image, and the bytes that reading it takes at most."""
    reader = load(index, **TRAIN | {"batch_size": 1, "short_side": 800, "long_side": 1333})._read
    tracemalloc.start()
    batch = reader(0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return batch, peak


def test_a_large_image_with_many_objects_takes_memory_for_their_boxes_only(dataset):
    """600 objects times 16 megapixels would be 9.6 GB."""
    side, rng = 4000, np.random.default_rng(0)
    corners = rng.integers(0, side - 20, (600, 2)).tolist()
    whole_image = coco_mask.encode(np.asfortranarray(np.pad(np.ones((9, 9), np.uint8), ((9, side - 18),) * 2)))
    run_lengths = {"size": [side, side], "counts": whole_image["counts"].decode()}
    annotations = [
        {"id": i, "image_id": 1, "category_id": 1, "iscrowd": 0, "area": 225, "bbox": [x, y, 15, 15]}
        | {"segmentation": run_lengths if i % 2 else [[x, y, x + 15, y, x + 15, y + 15, x, y + 15]]}
        for i, (x, y) in enumerate(corners, 1)
    ]
    index = load_coco(dataset.write([(side, side)], annotations), "train2017")
    batch, peak = read_batch(index)
    assert batch.gt.valid.sum() == 600
    assert peak < 250e6, f"{peak / 1e6:.0f} MB"


def test_objects_that_span_a_large_image_are_rasterised_one_by_one(dataset):
    """The boxes of 80 threads that cross 4 megapixels hold 320 MB."""
    side, annotations = 2000, []
    for i in range(1, 81):
        thread = [i, 0, i + 6, 0, 1900 + i, 1990, 1894 + i, 1990]
        box = {"bbox": [i, 0, 1900, 1990], "segmentation": [thread], "area": 11940}
        annotations.append({"id": i, "image_id": 1, "category_id": 1, "iscrowd": 0} | box)
    index = load_coco(dataset.write([(side, side)], annotations), "train2017")
    batch, peak = read_batch(index)
    assert batch.gt.valid.sum() == 80
    assert peak < 150e6, f"{peak / 1e6:.0f} MB"


def test_an_image_with_by_far_the_most_objects_is_named(dataset, caplog):
    square = {"category_id": 1, "bbox": [4, 2, 8, 6], "segmentation": [[4, 2, 12, 2, 12, 8, 4, 8]]}
    square |= {"iscrowd": 0, "area": 48}
    counts = [1] * 30 + [120]
    pairs = [image for image, count in enumerate(counts, 1) for _ in range(count)]
    annotations = [{"id": i, "image_id": image} | square for i, image in enumerate(pairs, 1)]
    index = load_coco(dataset.write([(24, 32)] * len(counts), annotations), "train2017")
    settings = TRAIN | {"batch_size": 1, "short_side": 24, "long_side": 32, "image_indices": [30], "num_steps": 2}
    (first, _) = load(index, **settings)
    assert first.gt.valid.shape == (1, 120)
    assert str(index.file_names[30]) in caplog.text
    assert "120 objects" in caplog.text
    caplog.clear()
    labelled = dataclasses.replace(index, labels=np.arange(len(index.labels), dtype=np.int32) % 100 + 1)
    first, second = load(labelled, **settings, max_objects=16)
    assert not caplog.text
    assert first.gt.valid.sum() == second.gt.valid.sum() == 16
    assert first.gt.labels.tolist() != second.gt.labels.tolist(), "the same objects in every epoch"


@pytest.mark.parametrize("long_side", [640, pytest.param(1920, marks=pytest.mark.slow), 4000])
def test_mask_targets_of_outlines_of_any_size_are_those_of_the_full_raster(coco_dir, tmp_path, long_side):
    """COCO's objects, enlarged: the targets from the loader's batch beside those of masks of the whole image."""
    content = json.loads((coco_dir / "annotations/instances_val2017.json").read_text())
    images = [image for image in content["images"] if max(image["height"], image["width"]) == 640][:12]
    objects = [a for a in content["annotations"] if isinstance(a["segmentation"], list) and min(a["bbox"][2:]) >= 8]
    factor = long_side / 640
    overlaps = []
    for image in images:
        height, width = round(image["height"] * factor), round(image["width"] * factor)
        size = transforms.resized_size(height, width, 800, 1333)
        for annotation in [a for a in objects if a["image_id"] == image["id"]][:6]:
            polygons = [[factor * value for value in part] for part in annotation["segmentation"]]
            rle = coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
            crop = decode_crop(rle)
            x, y, w, h = np.array(annotation["bbox"]) * factor * size[0] / height
            box = np.array([[x, y, x + w, y + h]], np.float32)
            got, full = (
                mask_target(*transforms.pack_masks([crop], (height, width), size, side), box, size)
                for side in (mask_side(1333, 96), 1344)
            )
            either = (got | full).sum()
            overlaps.append((got & full).sum() / either if either else 1.0)
    assert len(overlaps) >= 40
    assert np.mean(overlaps) >= 0.9999
    assert min(overlaps) >= 0.995


@functools.partial(jax.jit, static_argnames="max_size")
def compiled_target(packed, windows, raster, box, size, max_size):
    return mask_targets(packed, windows, raster, box, jnp.zeros(1, jnp.int32), size, max_size=max_size)


def mask_target(packed, windows, raster, box, size):
    return (
        np.asarray(compiled_target(packed, windows, jnp.array(raster), box, jnp.array(size), (1344, 1344)))[0] >= 0.5
    )
