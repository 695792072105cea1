"""Datasets in a bucket: the same samples and findings as on a disk."""

import json
import shutil

import jax
import numpy as np
import pytest

from maskrcnn_jax.checking.dataset import check_dataset
from maskrcnn_jax.data.dataset import load_coco
from maskrcnn_jax.data.held_out import record_held_out, take_part
from maskrcnn_jax.data.shapes import write_dataset
from maskrcnn_jax.data.tfds_source import load_tfds
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.options import Options
from maskrcnn_jax.paths import as_path, read_bytes, write_bytes
from tests.data.loading import load


@pytest.fixture(scope="module")
def folders(bucket, tmp_path_factory):
    """The same dataset on a disk and in a bucket. Some images lie in folders, and one has a name that is not plain."""
    folder = tmp_path_factory.mktemp("data") / "shapes"
    write_dataset(folder, num_train=6, num_val=2, image_size=64, seed=1)
    path = folder / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    names = [image["file_name"] for image in content["images"]]
    for image, name in zip(content["images"], [f"inner/{names[0]}", f"./{names[1]}"], strict=False):
        image["file_name"] = name
    (folder / "train2017" / "inner").mkdir()
    shutil.move(folder / "train2017" / names[0], folder / "train2017" / "inner")
    shutil.copy(folder / "train2017" / names[2], folder / "train2017" / "unlisted.jpg")
    path.write_text(json.dumps(content))
    return str(folder), bucket.upload(folder, "dataset")


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_from_a_bucket_are_those_from_a_disk(folders, workers):
    settings = {"batch_size": 2, "train": True, "annotations": True, "short_side": 64, "long_side": 64, "seed": 3}
    batches = [list(load(load_coco(folder, "train2017"), workers=workers, **settings)) for folder in folders]
    assert len(batches[0]) == 3
    jax.tree.map(np.testing.assert_array_equal, *batches)


def test_findings_in_a_bucket_are_those_on_a_disk(folders):
    found = [[[str(f) for f in split.findings] for split in check_dataset(dir, Options())] for dir in folders]
    assert "unlisted.jpg" in str(found[0])
    assert [[text.replace(folders[1], folders[0]) for text in split] for split in found[1]] == [
        [text.replace("/inner/", "/") for text in split] for split in found[0]
    ]


def test_what_a_dataset_in_a_bucket_lacks_is_a_sentence(bucket, folders):
    with pytest.raises(UserError, match="coco_dir gs://bucket/dataset has no split test2018, but train2017, val2017"):
        load_coco(folders[1], "test2018")
    with pytest.raises(UserError, match="coco_dir gs://bucket/nothing is not a folder"):
        load_coco(f"{bucket.url}/nothing", "train2017")
    for name in ("data.yaml", "labels/1.txt", "labels/2.txt"):
        write_bytes(as_path(f"{bucket.url}/yolo/{name}"), b"names: [cat]")
    with pytest.raises(UserError, match="gs://bucket/yolo holds data.yaml, labels/, which is no known layout"):
        load_coco(f"{bucket.url}/yolo", "train2017")
    with pytest.raises(UserError, match="tfds_dir gs://bucket/nothing cannot be in a bucket"):
        load_tfds(f"{bucket.url}/nothing", "train2017")
    names = {name for name in bucket.names() if name.startswith("dataset/val2017/")}
    bucket.server._storage.delete_file("bucket", sorted(names)[0])
    with pytest.raises(UserError, match=r"1 of 2 .* gs://bucket/dataset/val2017"):
        load_coco(folders[1], "val2017")


def test_the_images_that_are_held_out_can_be_recorded_in_a_bucket(bucket, folders):
    dataset, path = load_coco(folders[1], "train2017"), as_path(f"{bucket.url}/run/split.json")
    record_held_out(path, dataset, share=0.34, group="", seed=0)
    recorded = json.loads(read_bytes(path))
    for part, held_out in (("train", False), ("val", True)):
        assert take_part(dataset, str(path), held_out=held_out).file_names.tolist() == recorded[part] != []
