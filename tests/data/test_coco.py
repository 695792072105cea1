import gzip
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from maskrcnn_jax.data import images
from maskrcnn_jax.data.categories import Categories
from maskrcnn_jax.data.coco import drop_labels
from maskrcnn_jax.data.dataset import load_coco, load_dataset
from maskrcnn_jax.data.findings import Kind
from maskrcnn_jax.data.images import BrokenImageError, UndecodableError, decode_image
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.options import DataOptions

SQUARE = [2, 3, 10, 3, 10, 9, 2, 9]  # a polygon: columns 2..9, rows 3..8


def annotation(id, image_id, category_id=1, bbox=(2, 3, 8, 6), segmentation=None, **more):
    """Returns one annotation, by default of SQUARE."""
    segmentation = [SQUARE] if segmentation is None else segmentation
    fields = {"id": id, "image_id": image_id, "category_id": category_id, "bbox": list(bbox)}
    return fields | {"segmentation": segmentation, "iscrowd": 0, "area": 48} | more


def square_mask(height, width):
    mask = np.zeros((height, width), np.uint8)
    mask[3:9, 2:10] = 1
    return mask


def test_an_annotation_is_read_as_box_label_and_mask(dataset):
    root = dataset.write([(20, 30), (40, 50)], [annotation(7, image_id=2, category_id=2)])
    index = load_coco(root, "train2017")
    assert len(index) == 2
    assert index.problems == {}
    np.testing.assert_array_equal(index.sizes, [[20, 30], [40, 50]])
    np.testing.assert_array_equal(index.num_objects, [0, 1])
    objects = index.annotations(1)
    np.testing.assert_array_equal(objects.boxes, [[2, 3, 10, 9]])
    assert objects.boxes.dtype == np.float32
    assert objects.labels.tolist() == [2]
    assert objects.ids.tolist() == [7]
    np.testing.assert_array_equal(index.masks(1), [square_mask(40, 50)])
    assert index.image_path(0) == root / "train2017" / "1.jpg"


def test_an_image_without_objects_has_arrays_of_length_zero(dataset):
    index = load_coco(dataset.write([(20, 30)]), "train2017")
    assert index.annotations(0).boxes.shape == (0, 4)
    assert index.masks(0).shape == (0, 20, 30)


def test_annotations_are_sorted_by_image_whatever_their_order(dataset):
    owners = [3, 1, 2, 1, 3]
    root = dataset.write([(20, 30)] * 3, [annotation(k, image_id=i) for k, i in enumerate(owners)])
    index = load_coco(root, "train2017")
    assert [index.annotations(i).ids.tolist() for i in range(3)] == [[1, 3], [2], [0, 4]]


def test_the_sections_of_the_file_may_come_in_any_order(dataset):
    root = dataset.write([(20, 30)], [annotation(1, image_id=1)])
    expected = load_coco(root, "train2017")
    content = json.loads(dataset.json_path.read_text())
    dataset.json_path.write_text(json.dumps(dict(reversed(content.items())), indent=3))
    index = load_coco(root, "train2017")
    np.testing.assert_array_equal(index.boxes, expected.boxes)
    np.testing.assert_array_equal(index.masks(0), expected.masks(0))


@pytest.mark.parametrize("kind", ["polygons", "compressed", "uncompressed"])
def test_every_kind_of_segmentation_gives_the_mask_that_pycocotools_gives(dataset, kind):
    mask = square_mask(20, 30)
    mask[15:18, 20:29] = 1
    rle = coco_mask.encode(np.asfortranarray(mask))
    columns = mask.T.ravel()
    ends = np.concatenate([[0], np.flatnonzero(np.diff(columns)) + 1, [columns.size]])
    segmentation = {
        "polygons": [SQUARE, [20, 15, 29, 15, 29, 18, 20, 18]],
        "compressed": {"size": [20, 30], "counts": rle["counts"].decode()},
        "uncompressed": {"size": [20, 30], "counts": np.diff(ends).tolist()},
    }[kind]
    root = dataset.write([(20, 30)], [annotation(1, image_id=1), annotation(2, image_id=1, segmentation=segmentation)])
    np.testing.assert_array_equal(load_coco(root, "train2017").masks(0), [square_mask(20, 30), mask])


def test_polygons_that_pass_the_border_are_cut_there_as_pycocotools_cuts_them(dataset):
    polygon = [-5.3, 4.1, 50.7, -3.2, 45.2, 33.9, 12.6, 28.4, -8, 15]
    root = dataset.write([(20, 30)], [annotation(1, image_id=1, segmentation=[polygon])])
    expected = coco_mask.decode(coco_mask.frPyObjects([polygon], 20, 30))[:, :, 0]
    np.testing.assert_array_equal(load_coco(root, "train2017").masks(0)[0], expected)


def test_random_polygons_are_rasterised_as_pycocotools_does(dataset):
    rng = np.random.default_rng(0)
    polygons = [(rng.uniform(0, 15, 2) + rng.uniform(0, 10, (k, 2))).ravel().round(2).tolist() for k in (3, 4, 7) * 20]
    root = dataset.write([(20, 30)], [annotation(k, image_id=1, segmentation=[p]) for k, p in enumerate(polygons)])
    expected = coco_mask.decode(coco_mask.frPyObjects(polygons, 20, 30))
    np.testing.assert_array_equal(load_coco(root, "train2017").masks(0), expected.transpose(2, 0, 1))


def test_crowds_are_left_out_unless_asked_for(dataset):
    rle = coco_mask.encode(np.asfortranarray(square_mask(20, 30)))
    crowd = {"size": [20, 30], "counts": rle["counts"].decode()}
    root = dataset.write(
        [(20, 30)], [annotation(1, image_id=1, segmentation=crowd, iscrowd=1), annotation(2, image_id=1)]
    )
    index = load_coco(root, "train2017")
    assert index.annotations(0).ids.tolist() == [2]
    assert len(index.masks(0)) == 1
    assert index.annotations(0, with_crowd=True).crowd.tolist() == [True, False]
    assert len(index.masks(0, with_crowd=True)) == 2
    assert index.num_objects.tolist() == [1]


def test_other_categories_get_labels_from_1_in_order_of_id(dataset):
    root = dataset.write(
        [(20, 30)],
        [annotation(1, image_id=1, category_id=900), annotation(2, image_id=1, category_id=0)],
        names=[(900, "zebra"), (5, "ant"), (0, "bee")],
    )
    index = load_coco(root, "train2017")
    assert index.categories == Categories((0, 5, 900), ("bee", "ant", "zebra"), (1, 2, 3), 4)
    assert index.annotations(0).labels.tolist() == [3, 1]
    assert index.categories.category_id(3) == 900
    assert index.categories.name(1) == "bee"


ROBOFLOW = [
    {"id": 0, "name": "fish", "supercategory": "none"},
    {"id": 1, "name": "fish", "supercategory": "fish"},
    {"id": 2, "name": "ray", "supercategory": "fish"},
]


def test_a_category_that_is_only_the_heading_of_others_is_no_class(dataset, caplog):
    objects = [annotation(1, image_id=1), annotation(2, image_id=1, category_id=2)]
    root = dataset.write([(20, 30)], objects, categories=ROBOFLOW)
    with caplog.at_level("INFO", "maskrcnn_jax"):
        index = load_coco(root, "train2017")
    assert index.categories == Categories((1, 2), ("fish", "ray"), (1, 2), 3)
    assert "category fish (id 0) is left out" in caplog.text
    # With objects it is a class, as is one that no other names, or that has a supercategory itself.
    root = dataset.write([(20, 30)], [*objects, annotation(3, image_id=1, category_id=0)], categories=ROBOFLOW)
    assert load_coco(root, "train2017").categories.ids == (0, 1, 2)
    for other in ({"supercategory": "animal"}, {"name": "crab"}):
        root = dataset.write([(20, 30)], objects, categories=[ROBOFLOW[0] | other, *ROBOFLOW[1:]])
        assert load_coco(root, "train2017").categories.ids == (0, 1, 2)


def test_categories_can_be_left_out(dataset, caplog):
    objects = [annotation(i, image_id=1, category_id=i) for i in (1, 2, 3)]
    root = dataset.write([(20, 30)], objects, names=[(1, "cat"), (2, "dog"), (3, "owl")])
    options = DataOptions(coco_dir=str(root), exclude_categories=(2,))
    index = load_dataset(options, "train2017")
    assert index.categories == Categories((1, 3), ("cat", "owl"), (1, 2), 3)
    found = index.annotations(0, with_crowd=True)
    assert found.ids.tolist() == [1, 3]
    assert found.labels.tolist() == [1, 2]
    ignored = load_dataset(replace(options, ignore_regions=True), "train2017").annotations(0, with_crowd=True)
    assert ignored.labels.tolist() == [1, 0, 2]
    assert ignored.crowd.tolist() == [False, True, False]
    assert not caplog.records
    index = load_dataset(replace(options, exclude_categories=(7,)), "train2017")
    assert index.categories.ids == (1, 2, 3)
    assert "data.exclude_categories [7] is not in" in caplog.text and "1 (cat), 2 (dog), 3 (owl)" in caplog.text
    with pytest.raises(UserError, match="data.exclude_categories .* leaves no category"):
        load_dataset(replace(options, exclude_categories=(1, 2, 3)), "train2017")


@pytest.mark.parametrize("escaped", [True, False])
def test_names_beyond_ascii_are_read(dataset, escaped):
    root = dataset.write([(20, 30)], names=[(1, "猫 😀"), (2, "Käse")])
    dataset.image_path("1.jpg").rename(dataset.image_path("größe.jpg"))
    content = json.loads(dataset.json_path.read_text())
    content["images"][0]["file_name"] = "größe.jpg"
    dataset.json_path.write_text(json.dumps(content, ensure_ascii=escaped), encoding="utf-8")
    index = load_coco(root, "train2017")
    assert index.categories.names == ("猫 😀", "Käse")
    assert index.read_image(0).shape == (20, 30, 3)


# What is cleaned and counted


def test_unusable_annotations_are_dropped_and_counted(dataset, caplog):
    root = dataset.write(
        [(20, 30)],
        [
            annotation(1, image_id=1),
            annotation(2, image_id=1, bbox=(5, 5, 0, 6)),
            annotation(3, image_id=1, bbox=(40, 5, 5, 6)),
            annotation(4, image_id=1, bbox=(-4, 3, 8, 6)),
            annotation(5, image_id=1, bbox=(22, 3, 8.01, 6)),
            annotation(6, image_id=1, segmentation=[[1, 2, 3, 4]]),
            annotation(7, image_id=1, segmentation=[[1, 2, 3, 4], SQUARE]),
            annotation(8, image_id=1, segmentation=[]),
            annotation(10, image_id=1, segmentation=[[1e9, 1, 2e9, 3, 4, 1e9]]),
            annotation(11, image_id=1, segmentation=[[float("nan"), 1, 2, 3, 4, 5]]),
            annotation(9, image_id=1, segmentation={"size": [30, 20], "counts": [600]}),
            annotation(12, image_id=1, segmentation=[], bbox=[]),
        ],
    )
    index = load_coco(root, "train2017")
    objects = index.annotations(0)
    assert objects.ids.tolist() == [1, 4, 5, 6, 7, 8, 10, 11]
    assert objects.has_mask.tolist() == [True, True, True, False, True, False, False, False]
    np.testing.assert_array_equal(objects.boxes[[1, 2]], [[0, 3, 4, 9], [22, 3, 30, 9]])
    np.testing.assert_array_equal(index.masks(0)[objects.has_mask], [square_mask(20, 30)] * 4)
    assert not index.masks(0)[~objects.has_mask].any()
    assert index.problems == {
        Kind.SHORT_POLYGON: 2,
        Kind.FAR_POLYGON: 2,
        Kind.ONLY_BOX: 4,
        Kind.NO_BOX_NOR_MASK: 1,
        Kind.OTHER_SIZE: 1,
        Kind.FLAT_BOX: 1,
        Kind.OUTSIDE_BOX: 1,
        Kind.CLIPPED_BOX: 1,
    }
    assert len(caplog.records) == 1
    assert f"1 {Kind.FLAT_BOX}" in caplog.text


@pytest.mark.parametrize("segmentation", ["polygon", "counts", "compressed"])
def test_a_mask_without_a_box_gets_the_box_around_it(dataset, segmentation):
    mask = square_mask(20, 30)
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    rle = coco_mask.encode(np.asfortranarray(mask))
    flat = mask.ravel(order="F")
    changes = np.flatnonzero(np.diff(flat, prepend=0))
    forms = {
        "polygon": [SQUARE],
        "counts": {"size": [20, 30], "counts": np.diff(np.concatenate([[0], changes, [600]])).tolist()},
        "compressed": {"size": [20, 30], "counts": rle["counts"].decode()},
    }
    broken = annotation(2, image_id=1, segmentation=forms[segmentation])
    del broken["bbox"]
    index = load_coco(dataset.write([(20, 30)], [annotation(1, image_id=1), broken]), "train2017")
    around = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    np.testing.assert_allclose(index.annotations(0).boxes[1], around, atol=0 if segmentation != "polygon" else 1)
    assert index.problems == {}


@pytest.mark.parametrize("nothing", [None, "", [], {}])
def test_a_box_or_a_mask_may_be_empty(dataset, nothing):
    entries = [annotation(1, 1) | {"segmentation": nothing}, annotation(2, 1) | {"bbox": nothing}]
    index = load_coco(dataset.write([(20, 30)], entries), "train2017")
    assert len(index.labels) == 2 and index.problems == {Kind.ONLY_BOX: 1}


def test_objects_of_unlisted_categories_are_refused_or_kept_apart(dataset):
    objects = [annotation(1, image_id=1), annotation(2, image_id=1, category_id=77)]
    root = dataset.write([(20, 30)], objects)
    with pytest.raises(UserError, match="annotation 2 with category 77; .*data.ignore_regions"):
        load_coco(root, "train2017")
    index = load_coco(root, "train2017", keep_unlisted=True)
    assert index.annotations(0).ids.tolist() == [1]
    everything = index.annotations(0, with_crowd=True)
    assert everything.labels.tolist() == [1, 0]
    assert everything.crowd.tolist() == [False, True]
    assert index.problems == {Kind.IGNORED: 1}


def test_dropped_labels_are_nested_and_leave_the_images(dataset):
    objects = [annotation(i, image_id=1 + i % 3, category_id=1 + i % 2) for i in range(1, 31)]
    index = load_coco(dataset.write([(20, 30)] * 4, objects), "train2017")

    def ids(index):
        return {int(i): set(index.annotations(i).ids.tolist()) for i in range(len(index))}

    kept = {share: drop_labels(index, share, seed=1) for share in (0, 0.2, 0.5, 1)}
    assert ids(kept[0]) == ids(index)
    assert [len(k.labels) for k in kept.values()] == [30, 24, 15, 0]
    assert all(len(k) == 4 for k in kept.values())
    for i in range(4):
        assert ids(kept[0.5])[i] <= ids(kept[0.2])[i] <= ids(index)[i]
    labels = dict(zip(index.annotation_ids.tolist(), index.labels.tolist(), strict=True))
    assert all(labels[i] == label for i, label in zip(kept[0.5].annotation_ids, kept[0.5].labels, strict=True))
    assert ids(drop_labels(index, 0.5, seed=2)) != ids(kept[0.5])
    with pytest.raises(UserError, match="data.drop_labels 1.5"):
        drop_labels(index, 1.5, seed=0)


def test_a_dataset_of_which_no_annotation_is_usable_is_refused(dataset):
    root = dataset.write([(20, 30)], [annotation(1, image_id=1, segmentation=[], bbox=())])
    with pytest.raises(UserError, match="none of the 1 annotations"):
        load_coco(root, "train2017")


# What the user is told


@pytest.mark.parametrize(
    ("coco_dir", "told"),
    [("", "set data.coco_dir"), ("absent", "is not a folder"), ("empty", "holds nothing, which is no known layout")],
)
def test_a_folder_in_another_layout_is_refused_with_the_layout_wanted(tmp_path, monkeypatch, coco_dir, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=told) as error:
        load_coco(coco_dir, "train2017")
    assert "train2017/ (the images) and annotations/instances_train2017.json" in str(error.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            '[{"image_id": 1, "score": 0.5}]',
            "expected '{' at character 0, but there is a list; .* lists such as images",
        ),
        ('  "text"', "expected '{' at character 2, but there is text"),
        ("null", "there is null"),
        ("7", "there is a number"),
        (
            '{"images": {"1": "a.jpg"}}',
            r"expected '\[' at character 11, but there is an object; make \"images\" a list",
        ),
        ('{"images": [], "annotations": null}', 'there is null; make "annotations" a list'),
        ('{"images": [], "info": {}, "images": []}', '"images" occurs more than once; join them or remove one'),
    ],
)
def test_json_of_another_structure_is_not_said_to_be_broken(dataset, text, told):
    root = dataset.write([(20, 30)])
    dataset.json_path.write_text(text)
    with pytest.raises(UserError, match=told) as error:
        load_coco(root, "train2017")
    assert str(dataset.json_path) in str(error.value)
    assert "not valid JSON" not in str(error.value) and "cut short" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "expected '{' at character 0"),
        ("[1, 2]", "expected '{' at character 0"),
        ('{"images": [{"id": 1,', "at character 2"),
        ('{"images": [] "annotations": []}', "expected ',' at character 14"),
        ('{"images": []', "expected ',' at character 13"),
        ('{"images": 3}', r"expected '\[' at character 11"),
        ('{"info": {}} {', "unexpected text after the end"),
        ('{"info": "\n\n", \n oops', r"line 1, column 11"),
    ],
)
def test_broken_json_is_refused_with_file_and_position(dataset, text, told):
    root = dataset.write([(20, 30)])
    dataset.json_path.write_text(text)
    with pytest.raises(UserError, match=told) as error:
        load_coco(root, "train2017")
    assert str(dataset.json_path) in str(error.value)


def test_text_that_is_not_utf_8_is_refused(dataset):
    root = dataset.write([(20, 30)])
    dataset.json_path.write_bytes('{"info": "Käse"}'.encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        load_coco(root, "train2017")


@pytest.mark.parametrize(
    ("pack", "told"), [(gzip.compress, "compressed by gzip"), (lambda text: text.decode().encode("utf-16"), "UTF-16")]
)
def test_compressed_json_and_utf_16_are_refused_as_what_they_are(dataset, pack, told):
    root = dataset.write([(20, 30)])
    dataset.json_path.write_bytes(pack(dataset.json_path.read_bytes()))
    with pytest.raises(UserError, match=f"is not UTF-8 text: it is {told}"):
        load_coco(root, "train2017")


@pytest.mark.parametrize("section", ["images", "annotations", "categories"])
def test_a_file_without_one_of_the_sections_is_refused(dataset, section):
    dataset.write([(20, 30)])
    content = json.loads(dataset.json_path.read_text())
    del content[section]
    dataset.json_path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"has no {section}"):
        load_coco(dataset.root, "train2017")


IMAGE = {"id": 1, "file_name": "1.jpg", "height": 20, "width": 30}


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"images": []}, "lists no images"),
        ({"categories": []}, "lists no categories"),
        ({"images": [IMAGE, IMAGE]}, "image ids more than once, such as 1"),
        ({"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}, "category ids more than once"),
        ({"categories": [{"id": "x", "name": "a"}]}, "category x .* malformed"),
        ({"images": [{"id": 1, "file_name": "1.jpg", "height": 20}]}, "image 1 .* missing required field `width`"),
        ({"images": [IMAGE | {"height": 0}]}, "image 1 .* size 0x30"),
        ({"images": [3]}, "image 3 .* malformed"),
        ({"annotations": [annotation(5, image_id=9)]}, "annotation 5 with image 9; add the image"),
        ({"annotations": [annotation(5, image_id=1, category_id=9)]}, "annotation 5 with category 9"),
        ({"annotations": [annotation(5, image_id="one")]}, r"annotation 5 .* malformed: .*`\$.image_id`"),
        ({"annotations": [annotation(5, image_id=1, bbox=[1, 2, 3])]}, "annotation 5 .* malformed"),
        (
            {"annotations": [annotation(5, image_id=1) | {"segmentation": {"size": [1, 2]}}]},
            "missing required field `counts`",
        ),
        (
            {"annotations": [annotation(5, image_id=1, segmentation=[{"size": [20, 30], "counts": [600]}])]},
            r"annotation 5 .* malformed: .*`\$.segmentation\[0\]`",
        ),
        ({"annotations": [{"id": 5, "image_id": 1, "category_id": 1}]}, "none of the 1 annot.* neither box nor"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(dataset, sections, told):
    root = dataset.write([(20, 30)], **sections)
    with pytest.raises(UserError, match=told) as error:
        load_coco(root, "train2017")
    assert str(dataset.json_path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("counts", [[10, 5000, 2], [10, 50], []])
def test_run_lengths_that_do_not_fill_the_image_are_refused_by_annotation(dataset, counts):
    segmentation = {"size": [20, 30], "counts": counts}
    root = dataset.write([(20, 30)], [annotation(5, image_id=1, segmentation=segmentation)])
    with pytest.raises(UserError, match="annotation 5 does not fit"):
        load_coco(root, "train2017")


def test_missing_image_files_are_found_when_the_dataset_is_opened(dataset):
    root = dataset.write([(20, 30)] * 5)
    dataset.image_path("2.jpg").unlink()
    dataset.image_path("4.jpg").unlink()
    with pytest.raises(UserError, match=r"2 of 5 image files are missing .* such as 2.jpg, 4.jpg; .*skip_broken=true"):
        load_coco(root, "train2017")
    index = load_coco(root, "train2017", skip_broken=True)
    assert len(index) == 5
    assert index.problems == {Kind.MISSING_FILE: 2}


@pytest.mark.parametrize("name", ["1.jpg", "sub/1.jpg"])
@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_is_no_file_is_missing_and_never_opened(dataset, name, make):
    root = dataset.write([(20, 30)], images=[IMAGE | {"file_name": name}])
    dataset.image_path("1.jpg").unlink()
    dataset.image_path("sub").mkdir()
    make(dataset.image_path(name))
    with pytest.raises(UserError, match="1 of 1 image files is missing"):
        load_coco(root, "train2017")


def test_file_names_may_name_subfolders(dataset):
    root = dataset.write([(20, 30)], images=[IMAGE | {"file_name": "sub/1.jpg"}])
    dataset.image_path("sub").mkdir()
    dataset.image_path("1.jpg").rename(dataset.image_path("sub/1.jpg"))
    assert load_coco(root, "train2017").read_image(0).shape == (20, 30, 3)


# Images


def test_images_are_rgb_bytes(dataset):
    root = dataset.write([(20, 30)])
    cv2.imwrite(str(dataset.image_path("1.jpg")), np.full((20, 30, 3), (10, 60, 200), np.uint8))  # blue, green, red
    image = load_coco(root, "train2017").read_image(0)
    assert image.dtype == np.uint8
    assert image.shape == (20, 30, 3)
    np.testing.assert_allclose(image[10, 10], [200, 60, 10], atol=2)


def test_greyscale_jpeg_becomes_three_equal_channels(dataset):
    root = dataset.write([(20, 30)])
    cv2.imwrite(str(dataset.image_path("1.jpg")), np.full((20, 30), 77, np.uint8))
    image = load_coco(root, "train2017").read_image(0)
    assert image.shape == (20, 30, 3)
    assert (image == 77).all()


def test_cmyk_jpeg_has_the_right_colours(dataset):
    pillow = pytest.importorskip("PIL.Image")
    root = dataset.write([(20, 30)])
    expected = np.zeros((20, 30, 3), np.uint8)
    expected[:, :16], expected[:, 16:] = (200, 40, 30), (30, 60, 210)
    pillow.fromarray(expected).convert("CMYK").save(dataset.image_path("1.jpg"), quality=95)
    image = load_coco(root, "train2017").read_image(0)
    np.testing.assert_allclose(image[:, [4, 24]].astype(int), expected[:, [4, 24]], atol=4)


def test_the_orientation_in_exif_is_ignored(dataset):
    pillow = pytest.importorskip("PIL.Image")
    root = dataset.write([(20, 30)])
    exif = pillow.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    pillow.new("RGB", (30, 20)).save(dataset.image_path("1.jpg"), exif=exif)
    assert load_coco(root, "train2017").read_image(0).shape == (20, 30, 3)


def break_image(path, how):
    data = path.read_bytes()
    if how == "removed":
        path.unlink()
    elif how == "png cut short":
        data = cv2.imencode(".png", cv2.imread(str(path)))[1].tobytes()
        path.write_bytes(data[: len(data) * 9 // 10])
    elif how == "another size":
        cv2.imwrite(str(path), np.zeros((21, 30, 3), np.uint8))
    else:
        path.write_bytes({"empty": b"", "text": b"not found", "cut short": data[:-40], "no end": data[:-2]}[how])


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("removed", "cannot be read"),
        ("empty", "is empty"),
        ("text", "is not an image"),
        ("cut short", "is truncated"),
        ("no end", "is truncated"),
        ("png cut short", "is truncated"),
        ("another size", "has 21x30 pixels .* say 20x30"),
    ],
)
def test_a_broken_image_is_named_with_the_way_out(dataset, how, told):
    index = load_coco(dataset.write([(20, 30)]), "train2017")
    break_image(dataset.image_path("1.jpg"), how)
    with pytest.raises(BrokenImageError, match=told) as error:
        index.read_image(0)
    assert "1.jpg" in str(error.value)
    assert "set data.skip_broken=true" in str(error.value)


def test_an_image_of_many_times_the_pixels_is_refused_before_it_is_decoded(dataset, monkeypatch):
    index = load_coco(dataset.write([(20, 30)]), "train2017")
    cv2.imwrite(str(dataset.image_path("1.jpg")), np.zeros((50, 50), np.uint8))
    monkeypatch.setattr(images, "decode_image", None)
    with pytest.raises(BrokenImageError, match=r"has 50x50 pixels .* where the annotations say 20x30"):
        index.read_image(0)


def test_a_jpeg_is_whole_if_bytes_follow_its_end_and_cut_if_only_its_thumbnail_ends(dataset):
    index = load_coco(dataset.write([(20, 30)]), "train2017")
    path = dataset.image_path("1.jpg")
    data = path.read_bytes()
    path.write_bytes(data + b"\0" * 3000)
    assert index.read_image(0).shape == (20, 30, 3)
    thumbnail = b"\xff\xe1" + (len(data) + 2).to_bytes(2, "big") + data  # as a header field
    path.write_bytes(data[:2] + thumbnail + data[2:-40])
    with pytest.raises(BrokenImageError, match="is truncated"):
        index.read_image(0)


# Real images, and the size of all of COCO


def test_on_coco_the_masks_and_boxes_are_those_of_pycocotools(coco_dir):
    root = coco_dir
    index, reference = load_coco(root, "val2017"), COCO(root / "annotations" / "instances_val2017.json")
    assert index.categories.num_classes == 91
    seen = 0
    for i in range(min(len(index), 200)):
        objects, masks = index.annotations(i, with_crowd=True), index.masks(i, with_crowd=True)
        for k, id in enumerate(objects.ids):
            expected = reference.anns[id]
            assert expected["image_id"] == index.image_ids[i]
            assert expected["category_id"] == objects.labels[k]
            np.testing.assert_array_equal(masks[k], reference.annToMask(expected))
            x, y, width, height = expected["bbox"]
            np.testing.assert_allclose(objects.boxes[k], [x, y, x + width, y + height], atol=1)
            seen += 1
        assert index.read_image(i).shape[:2] == tuple(index.sizes[i])
    assert seen


@pytest.mark.slow
def test_annotations_of_cocos_size_open_within_seconds_and_a_gigabyte(tmp_path):
    script = Path(__file__).with_name("large_index.py")
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}
    subprocess.run([sys.executable, script, "write", tmp_path / "large"], check=True)
    done = subprocess.run(
        [sys.executable, script, "measure", tmp_path / "large"], check=True, capture_output=True, env=environment
    )
    measured = json.loads(done.stdout)
    assert measured["images"] == 118_287
    assert measured["objects"] == 860_001
    assert measured["seconds"] < 12, measured  # 4 on an idle machine
    assert measured["check_seconds"] < 10, measured
    assert measured["findings"] == ["boxes that do not fit their masks"], "their polygons are random"
    assert measured["peak_bytes"] < 1e9, measured


@pytest.mark.parametrize("size", [[0, 24], [20, 0], [10**9, 10**9], [-20, -24]])
def test_a_run_length_mask_of_an_impossible_size_is_refused(dataset, size):
    mask = {"size": size, "counts": "0PY0"}  # without a box, pycocotools divides by the height
    root = dataset.write([(20, 24)], [{"id": 1, "image_id": 1, "category_id": 1, "segmentation": mask}])
    with pytest.raises(UserError, match="the size of its mask is"):
        load_coco(root, "train2017")


def test_a_polygon_that_takes_long_to_draw_is_dropped(dataset):
    zigzag = [9e4, 0, -9e4, 10] * 100
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9], "segmentation": [zigzag]}
    index = load_coco(dataset.write([(20, 24)], [annotation]), "train2017")
    assert index.problems[Kind.FAR_POLYGON] == 1 and not index.has_mask.any()


@pytest.mark.parametrize("name", ["a\0.jpg", "a\n.jpg", "\ud800.jpg"])
def test_a_name_that_no_file_can_have_is_refused(dataset, name):
    root = dataset.write([(20, 24)], images=[{"id": 1, "file_name": name, "height": 20, "width": 24}])
    with pytest.raises(UserError, match="image 1 in .* is malformed: file_name a?") as raised:
        load_coco(root, "train2017")
    assert "\n" not in str(raised.value) and str(raised.value).encode()


def test_an_image_that_claims_far_more_than_its_file_holds_is_not_decoded():
    data = cv2.imencode(".png", np.zeros((9, 9, 3), np.uint8))[1].tobytes()
    assert decode_image(data).shape == (9, 9, 3)
    sides, length = (data[:16] + b"\0\0\x75\0" * 2 + data[24:], data[:33] + b"\x7f\xff\0\0" + data[37:])
    with pytest.raises(UndecodableError, match="has 29952x29952 pixels .* in 87 bytes"):
        decode_image(sides)
    with pytest.raises(UndecodableError, match="is truncated or damaged"):
        decode_image(length)
