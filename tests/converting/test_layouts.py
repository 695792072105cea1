"""Every layout of another tool gives the dataset that it was made from."""

import itertools
import json
import logging

import numpy as np
import pytest
from PIL import Image

from maskrcnn_jax.converting.convert import convert
from maskrcnn_jax.data.dataset import load_coco
from maskrcnn_jax.errors import UserError
from tests.converting import layout_writers
from tests.converting.layout_writers import ONE_SPLIT, POLYGONS, RASTERS, SPLITS, TWO_SPLITS, raster


def by_writer(*groups):
    writers = [writer for group in groups for writer in group]
    return pytest.mark.parametrize("writer", writers, ids=lambda writer: writer.__name__)


def overlap(a, b):
    return (a & b).sum() / max((a | b).sum(), 1)


def assert_same(index, part, hides=None):
    """Fails unless an index has the images, classes, boxes and masks of a split.

    ``hides`` says of two annotations whether the second covers the first, which is gone if nothing of it is left.
    """
    known = {image["file_name"]: (image, annotations) for image, annotations in part}
    assert sorted(name.rpartition("/")[2] for name in index.file_names.tolist()) == sorted(known)
    assert set(index.categories.names) == set(part.names.values())
    for i, name in enumerate(index.file_names.tolist()):
        image, annotations = known[name.rpartition("/")[2]]
        size = image["height"], image["width"]
        assert tuple(index.sizes[i]) == size
        masks = [raster(annotation, *size) for annotation in annotations]
        if hides:
            for (k, a), (j, b) in itertools.combinations(enumerate(annotations), 2):
                masks[k] = masks[k] & ~masks[j] if hides(a, b) else masks[k]
        wanted = [(a, mask) for a, mask in zip(annotations, masks, strict=True) if mask.any() or not hides]
        found = index.annotations(i)
        left = list(range(len(found.labels)))
        assert len(left) == len(wanted), name
        found_masks = index.masks(i) > 0
        for annotation, mask in wanted:
            best = max(left, key=lambda k: overlap(found_masks[k], mask))
            left.remove(best)
            assert index.categories.name(found.labels[best]) == part.names[annotation["category_id"]]
            assert overlap(found_masks[best], mask) >= 0.99 or not mask.any()
            if not hides:
                x, y, width, height = annotation["bbox"]
                np.testing.assert_allclose(found.boxes[best], [x, y, x + width, y + height], atol=0.5)
            else:
                ys, xs = np.nonzero(mask)
                expected = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
                np.testing.assert_allclose(found.boxes[best], expected, atol=0.5)


@by_writer(TWO_SPLITS, ONE_SPLIT)
def test_an_export_in_cocos_format_is_read_as_it_is(writer, parts, tmp_path, caplog):
    writer(tmp_path, parts)
    standard = dict(zip(SPLITS, ("train2017", "val2017"), strict=True))
    for split in SPLITS if writer in TWO_SPLITS else SPLITS[:1]:
        caplog.clear()
        with caplog.at_level(logging.INFO, "maskrcnn_jax"):
            index = load_coco(tmp_path, standard[split])
        assert_same(index, parts[split])
        (line,) = [record.getMessage() for record in caplog.records]
        assert str(tmp_path) in line and f"read as {standard[split]}" in line and "\n" not in line


@by_writer(TWO_SPLITS, ONE_SPLIT, RASTERS, POLYGONS)
def test_a_converted_dataset_is_the_original(writer, parts, tmp_path):
    if writer in POLYGONS[:2]:
        parts = {split: single_polygons(part) for split, part in parts.items()}
    writer(tmp_path / "in", parts)
    convert(tmp_path / "in", tmp_path / "out")
    for split in SPLITS if writer not in ONE_SPLIT else SPLITS[:1]:
        index = load_coco(tmp_path / "out", split)
        assert_same(index, parts[split], HIDES.get(writer))
        if writer in (*POLYGONS, *RASTERS):
            assert index.file_names.tolist() == sorted(image["file_name"] for image, _ in parts[split])


HIDES = dict.fromkeys(RASTERS[:3], lambda a, b: True)
HIDES |= dict.fromkeys(RASTERS[3:], lambda a, b: a["category_id"] == b["category_id"])


def single_polygons(part):
    """Returns a split with the objects that YOLO can hold: those of one polygon."""
    content = part.content
    kept = [annotation for annotation in content["annotations"] if len(annotation["segmentation"]) == 1]
    return layout_writers.Part(content | {"annotations": kept}, part.folder)


@by_writer(POLYGONS, RASTERS)
def test_what_has_to_be_converted_is_said_with_the_command(writer, shapes_parts, tmp_path):
    writer(tmp_path, shapes_parts)
    with pytest.raises(UserError, match=f"run maskrcnn-jax convert {tmp_path} OUT and set data.coco_dir=OUT"):
        load_coco(tmp_path, "train")


@pytest.mark.parametrize(
    ("listed", "found"),
    [("images\\a b.jpg", "images/a b.jpg"), ("images/a%20b.jpg", "images/a b.jpg"), ("../a.jpg", "a.jpg")],
)
def test_images_that_are_listed_in_another_form_are_found(tmp_path, listed, found):
    path, root = tmp_path / "in" / found, tmp_path / "in"
    path.parent.mkdir(parents=True)
    Image.new("RGB", (64, 48)).save(path)
    (root / "labels").mkdir()
    content = {
        "images": [{"id": 0, "file_name": listed, "width": 64, "height": 48}],
        "annotations": [{"id": 0, "image_id": 0, "category_id": 0, "bbox": [5, 5, 10, 10]}],
        "categories": [{"id": 0, "name": "cat"}],
    }
    ((root / "labels" if listed.startswith("..") else root) / "result.json").write_text(json.dumps(content))
    convert(root, tmp_path / "out")
    for folder in (root, tmp_path / "out"):
        assert len(load_coco(folder, "train").labels) == 1


@pytest.mark.parametrize("line", ["my photo", '"my photo"', "my photo.jpg", "JPEGImages/my photo.jpg", "photo  1"])
def test_names_in_vocs_lists_may_have_spaces(tmp_path, line):
    stem = "my photo" if "my" in line else "photo"
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (tmp_path / "in" / folder).mkdir(parents=True)
    Image.new("RGB", (64, 48)).save(tmp_path / "in" / "JPEGImages" / f"{stem}.jpg")
    corners = "<xmin>5</xmin><ymin>5</ymin><xmax>15</xmax><ymax>15</ymax>"
    (tmp_path / "in" / "Annotations" / f"{stem}.xml").write_text(
        f"<annotation><object><name>cat</name><bndbox>{corners}</bndbox></object></annotation>"
    )
    (tmp_path / "in" / "ImageSets" / "Main" / "train.txt").write_text(f"{line}\n")
    assert convert(tmp_path / "in", tmp_path / "out") == {"train": (1, 1)}
