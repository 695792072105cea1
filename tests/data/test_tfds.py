import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from pycocotools import mask as coco_mask

from maskrcnn_jax.checking.annotations import check_index
from maskrcnn_jax.data import tfds_builder
from maskrcnn_jax.data.coco import CocoDataset, drop_labels, exclude_categories
from maskrcnn_jax.data.dataset import load_coco, load_dataset
from maskrcnn_jax.data.findings import Kind
from maskrcnn_jax.data.images import BrokenImageError
from maskrcnn_jax.data.shapes import write_dataset
from maskrcnn_jax.data.tfds_builder import build
from maskrcnn_jax.data.tfds_source import annotation_path, dataset_folder, load_tfds
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.evaluation.coco_metrics import ground_truth
from maskrcnn_jax.options import DataOptions
from tests.data.loading import load

SETTINGS = {"batch_size": 4, "short_side": 64, "long_side": 96, "train": True, "annotations": True, "hflip": 0.5}
SETTINGS |= {"color_jitter": 0.2, "threads": 2}
POLYGONS = [[2, 3, 10, 3, 10, 9, 2, 9], [12.5, 3.1, 19.9, 4.2, 15.3, 11.7]]


def run_lengths(height, width):
    mask = np.zeros((height, width), np.uint8, order="F")
    mask[3:9, 2:12] = 1
    return {"size": [height, width], "counts": coco_mask.encode(mask)["counts"].decode()}


def annotation(id, image_id, segmentation, category_id=1, **more):
    fields = {"id": id, "image_id": image_id, "category_id": category_id, "bbox": [2, 3, 8, 6], "iscrowd": 0}
    return fields | {"segmentation": segmentation, "area": 48} | more


@pytest.fixture
def odd(dataset):
    """A dataset with all that annotations may be: crowds, no masks, unlisted categories, out of order, twice."""
    big = 2**40
    sizes = [(20, 30), (40, 24), (33, 33), (20, 30), (24, 40), (30, 20)]
    annotations = [
        annotation(big + 9, 5, POLYGONS[:1], category_id=7),
        annotation(8, 1, POLYGONS),
        annotation(15, 1, POLYGONS),
        annotation(3, 1, run_lengths(20, 30), iscrowd=1),
        annotation(5, 3, []),
        annotation(6, 1, POLYGONS[1:], category_id=7, bbox=[-4.3, 3, 8.21, 6]),
        annotation(7, 2, run_lengths(40, 24), category_id=99),
        annotation(10, 2, POLYGONS[:1], bbox=[5, 5, 0, 6]),
        annotation(11, 2, POLYGONS[1:], bbox=None),
        annotation(12, 2, {"size": [40, 24], "counts": [100, 60, 800]}, area=-1),
        annotation(13, 6, run_lengths(20, 30)),
        annotation(14, big, [[-5.3, 4.1, 50.7, -3.2, 45.2, 33.9, 12.6, 28.4, -8, 15]], iscrowd=1),
    ]
    images = [
        {"id": big if i == 4 else i, "file_name": f"{i}.jpg", "height": h, "width": w}
        for i, (h, w) in enumerate(sizes, start=1)
    ]
    dataset.write(sizes, annotations, names=((7, "猫"), (1, "dog")), images=images)
    return dataset.root


def assert_same_arrays(expected, found):
    for name, array in expected._asdict().items():
        if name == "gt":
            assert_same_arrays(array, found.gt)
        elif array is None:
            assert getattr(found, name) is None
        else:
            assert array.dtype == getattr(found, name).dtype
            np.testing.assert_array_equal(array, getattr(found, name), err_msg=name)


def assert_same_samples(expected, found, num_steps=None, **settings):
    np.testing.assert_array_equal(expected.image_ids, found.image_ids)
    assert expected.categories == found.categories
    assert expected.problems == found.problems
    batches = load(expected, **SETTINGS | settings, num_steps=num_steps)
    assert len(batches) > 1
    for ours, theirs in zip(batches, load(found, **SETTINGS | settings, num_steps=num_steps), strict=True):
        assert_same_arrays(ours, theirs)


@pytest.fixture(scope="session")
def tfds_coco(coco_dir, tmp_path_factory):
    """COCO's images for validation as a dataset."""
    root = tmp_path_factory.mktemp("tfds")
    build(coco_dir, root, splits=["val2017"])
    return root


@pytest.mark.parametrize("ignore_regions", [False, True])
def test_the_samples_are_those_of_coco_images(coco_dir, tfds_coco, ignore_regions):
    expected, found = load_coco(coco_dir, "val2017"), load_tfds(tfds_coco, "val2017")
    settings = {"short_side": 320, "long_side": 544, "ignore_regions": ignore_regions}
    assert expected.crowd[: expected.offsets[20]].any() or not ignore_regions
    assert_same_samples(expected, found, image_indices=np.arange(20), **settings)


def test_annotations_and_masks_of_coco_are_the_same(coco_dir, tfds_coco):
    expected, found = load_coco(coco_dir, "val2017"), load_tfds(tfds_coco, "val2017")
    assert expected.crowd.any()
    crowded = np.unique(np.searchsorted(expected.offsets, np.flatnonzero(expected.crowd), side="right") - 1)
    for i in {*crowded.tolist(), *range(0, len(expected), 5)}:
        np.testing.assert_array_equal(expected.masks(i, True), found.masks(i, True))
        for ours, theirs in zip(expected.annotations(i, True), found.annotations(i, True), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_the_samples_are_those_of_shapes(tmp_path):
    write_dataset(tmp_path / "shapes", num_train=10, num_val=3, image_size=64, seed=2)
    build(tmp_path / "shapes", tmp_path / "tfds")
    for split in ("train2017", "val2017"):
        expected = load_coco(tmp_path / "shapes", split)
        found = load_tfds(tmp_path / "tfds", split)
        assert_same_samples(expected, found, batch_size=2, resize="float32")
    augmented = {"crop_size": 64, "scale_jitter": (0.1, 2.0), "copy_paste": 1.0, "rotation": 10.0}
    expected, found = load_coco(tmp_path / "shapes", "train2017"), load_tfds(tmp_path / "tfds", "train2017")
    assert_same_samples(expected, found, **augmented)


@pytest.mark.parametrize("ignore_regions", [False, True])
def test_odd_annotations_are_read_alike(odd, tmp_path, ignore_regions):
    build(odd, tmp_path / "tfds")
    if not ignore_regions:
        for open_split in (load_coco, load_tfds):
            with pytest.raises(UserError, match="annotation 7 with category 99; .*data.ignore_regions"):
                open_split(odd if open_split is load_coco else tmp_path / "tfds", "train2017")
    expected = load_coco(odd, "train2017", keep_unlisted=True)
    found = load_tfds(tmp_path / "tfds", "train2017", keep_unlisted=True)
    assert len(expected.problems) >= 4
    same = [[f for f in check_index(index) if f.kind == Kind.SAME_ANNOTATION] for index in (expected, found)]
    twice = [[finding.rows.tolist() for finding in findings] for findings in same]
    assert twice[0] == twice[1]
    assert len(twice[0]) == 1
    assert_same_samples(expected, found, num_steps=6, ignore_regions=ignore_regions)
    parts = [exclude_categories(index, [7], ignore=ignore_regions) for index in (expected, found)]
    assert parts[0].categories.names == ("dog",)
    assert_same_samples(*parts, num_steps=6, ignore_regions=ignore_regions)
    expected, found = drop_labels(expected, 0.4, seed=1), drop_labels(found, 0.4, seed=1)
    assert_same_samples(expected, found, num_steps=6, ignore_regions=ignore_regions)


def test_evaluations_compare_with_the_same_ground_truth(odd, tmp_path):
    build(odd, tmp_path)
    options = {"keep_unlisted": True, "keep_flat": True}
    expected = ground_truth(load_coco(odd, "train2017", **options)).dataset
    assert ground_truth(load_tfds(tmp_path, "train2017", **options)).dataset == expected
    assert [0, 6] in [a["bbox"][2:] for a in expected["annotations"]], "a box without area"


def test_records_hold_what_the_annotation_file_says(odd, tmp_path):
    build(odd, tmp_path)
    content = json.loads((odd / "annotations" / "instances_train2017.json").read_text())
    examples = list(tfds.data_source("coco_instances", split="train2017", data_dir=tmp_path, download=False))
    assert len(examples) == len(content["images"])
    index = load_coco(odd, "train2017", keep_unlisted=True)
    seen = 0
    for i, (example, image) in enumerate(zip(examples, content["images"], strict=True)):
        assert example["image"].shape == (image["height"], image["width"], 3)
        assert (example["height"], example["width"]) == (image["height"], image["width"])
        assert (example["image/id"], example["image/filename"].decode()) == (image["id"], image["file_name"])
        objects = {name: list(values) for name, values in example["objects"].items()}
        masks = dict(zip(index.annotations(i, True).ids.tolist(), index.masks(i, True), strict=True))
        for k, id in enumerate(objects["id"]):
            (row,) = (row for row in content["annotations"] if row["id"] == id)
            assert row["image_id"] == image["id"]
            assert objects["is_crowd"][k] == row["iscrowd"]
            assert objects["category_id"][k] == (row["category_id"] if row["category_id"] != 99 else -1)
            if row["bbox"]:
                np.testing.assert_array_equal(objects["bbox"][k], np.float32(row["bbox"]))
            counts = objects["segmentation"][k]
            if counts and id in masks:
                rle = {"size": [image["height"], image["width"]], "counts": counts}
                np.testing.assert_array_equal(coco_mask.decode(rle), masks[id])
            assert bool(counts) == bool(row["segmentation"])
            seen += 1
    assert seen == len(content["annotations"]) - 1, "a mask of another size than its image makes an object unusable"


@pytest.mark.slow
def test_loading_processes_read_the_same(odd, tmp_path):
    build(odd, tmp_path)
    index = load_tfds(tmp_path, "train2017", keep_unlisted=True)
    expected = list(load(index, **SETTINGS, num_steps=4))
    found = list(load(index, **SETTINGS, num_steps=4, workers=2))
    for ours, theirs in zip(expected, found, strict=True):
        assert_same_arrays(ours, theirs)


def test_reading_needs_neither_jax_nor_tensorflow(odd, tmp_path):
    build(odd, tmp_path)
    script = f"""
import sys
from maskrcnn_jax.data.tfds_source import load_tfds
index = load_tfds({str(tmp_path)!r}, "train2017", keep_unlisted=True)
assert index.read_image(0).any() and index.masks(0).any()
assert "tensorflow_datasets" in sys.modules
assert not {{"jax", "tensorflow"}} & set(sys.modules)
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)


def test_many_shards_keep_the_order_of_the_images(odd, tmp_path, monkeypatch):
    monkeypatch.setattr(tfds_builder, "_SHARD_BYTES", 1000)
    build(odd, tmp_path)
    assert len(list(dataset_folder(tmp_path).glob("*.array_record-*"))) > 3
    expected = load_coco(odd, "train2017", keep_unlisted=True)
    assert_same_samples(expected, load_tfds(tmp_path, "train2017", keep_unlisted=True), num_steps=4)


def test_opening_a_dataset_reads_no_record(odd, tmp_path):
    build(odd, tmp_path)
    for path in dataset_folder(tmp_path).glob("*.array_record-*"):
        path.unlink()
    index = load_tfds(tmp_path, "train2017", keep_unlisted=True)
    assert len(index) == 6
    with pytest.raises(UserError, match=r"example 0 of train2017 in .* cannot be read .*build it again"):
        index.read_image(0)


def test_a_damaged_record_is_an_error_in_a_sentence(odd, tmp_path):
    build(odd, tmp_path)
    (path,) = dataset_folder(tmp_path).glob("*.array_record-*")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match="example . of train2017 in .* cannot be read"):
        list(load(load_tfds(tmp_path, "train2017", keep_unlisted=True), **SETTINGS))


def test_a_folder_without_the_dataset_or_the_split_is_refused(odd, tmp_path):
    with pytest.raises(UserError, match="no dataset was given; set .*data.tfds_dir"):
        load_dataset(DataOptions(source="tfds"), "train2017")
    data = DataOptions(source="tfds", tfds_dir=str(tmp_path))
    with pytest.raises(UserError, match="has no coco_instances/1.0.0; .*maskrcnn-jax build-tfds"):
        load_dataset(data, "train2017")
    build(odd, tmp_path)
    with pytest.raises(UserError, match="has no split val2017; use one of train2017"):
        load_dataset(data, "val2017")


def nothing_is_left(tfds_dir):
    with pytest.raises(UserError, match="has no coco_instances"):
        load_tfds(tfds_dir, "train2017")
    return not list(Path(tfds_dir).rglob("*.array_record*"))


def test_broken_images_stop_the_build_or_are_kept_as_they_are(odd, tmp_path, caplog):
    (odd / "train2017" / "1.jpg").write_bytes(b"no image")
    truncated = odd / "train2017" / "2.jpg"
    truncated.write_bytes(truncated.read_bytes()[:-20])
    with pytest.raises(BrokenImageError, match=r"1.jpg is not an image that can be decoded"):
        build(odd, tmp_path / "tfds")
    assert nothing_is_left(tmp_path / "tfds")
    (odd / "train2017" / "3.jpg").unlink()
    with pytest.raises(UserError, match="1 of 6 image files is missing"):
        build(odd, tmp_path / "tfds")
    build(odd, tmp_path / "tfds", skip_broken=True)
    assert caplog.text.count("skip_broken=true") == 3
    expected = load_coco(odd, "train2017", keep_unlisted=True, skip_broken=True)
    found = load_tfds(tmp_path / "tfds", "train2017", keep_unlisted=True)
    for i, told in enumerate(["is not an image", "is truncated", "is empty"]):
        with pytest.raises(BrokenImageError, match=f"{i + 1}.jpg {told}"):
            found.read_image(i)
    expected = dataclasses.replace(expected, missing=expected.missing[:0])  # the build has logged them
    assert_same_samples(expected, found, num_steps=4, skip_broken=True)


def test_a_mask_that_does_not_fit_stops_the_build(dataset, tmp_path):
    rle = {"size": [20, 30], "counts": [100, 60, 800]}
    root = dataset.write([(20, 30)], [annotation(4, 1, rle)])
    with pytest.raises(UserError, match="mask of annotation 4 does not fit its image 1.jpg of 20x30 pixels"):
        build(root, tmp_path)
    assert nothing_is_left(tmp_path)


def test_an_interrupted_build_leaves_nothing_that_looks_whole(odd, tmp_path, monkeypatch):
    def interrupted(dataset, row, height, width):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(CocoDataset, "rle", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build(odd, tmp_path)
    assert nothing_is_left(tmp_path)
    build(odd, tmp_path)
    assert len(load_tfds(tmp_path, "train2017", keep_unlisted=True)) == 6


def test_a_disk_that_fills_up_is_said_and_nothing_is_left(odd, tmp_path):
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))"
    script = f"{limited}\nfrom maskrcnn_jax.data.tfds_builder import build\nbuild({str(odd)!r}, {str(tmp_path)!r})"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    built = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert "UserError: cannot write" in built.stderr
    assert "File too large" in built.stderr
    assert nothing_is_left(tmp_path)


def test_what_cannot_be_built_is_said(odd, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"has no annotations/instances_\*.json"):
        build(tmp_path / "empty", tmp_path / "tfds")
    with pytest.raises(UserError, match="has no split val2017, but train2017"):
        build(odd, tmp_path / "tfds", splits=["val2017"])
    with pytest.raises(UserError, match="cannot have a split named 'my-split'"):
        build(odd, tmp_path / "tfds", splits=["my-split"])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write .*file"):
        build(odd, tmp_path / "file" / "tfds")
    build(odd, tmp_path / "tfds")
    with pytest.raises(UserError, match="exists already; remove it"):
        build(odd, tmp_path / "tfds")


def test_the_dataset_is_whole_without_the_folder_it_was_made_from(odd, tmp_path):
    build(odd, tmp_path)
    original = (odd / "annotations" / "instances_train2017.json").read_bytes()
    shutil.rmtree(odd)
    index = load_tfds(tmp_path, "train2017", keep_unlisted=True)
    assert index.annotation_path == annotation_path(dataset_folder(tmp_path), "train2017")
    assert index.annotation_path.read_bytes() == original
    assert index.read_image(0).shape == (20, 30, 3)
