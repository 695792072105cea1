"""What is wrong in another format is refused in a sentence with the file, what came and what to do."""

import json
import os
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from maskrcnn_jax.converting.convert import convert
from maskrcnn_jax.errors import UserError
from tests.converting.layout_writers import labelme, masks_by_class, roboflow, voc, voc_in_colours, yolo
from tests.hostile import assert_sentence


def first(root, pattern):
    return sorted(root.rglob(pattern))[0]


def rewrite(path, *pairs):
    text = path.read_text()
    for old, new in pairs:
        assert old in text
        text = text.replace(old, new, 1)
    path.write_text(text)


def change_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# YOLO: the function damages the folder and returns words that the sentence must have.


def pixels_instead_of_shares(root):
    path = first(root, "labels/train/*.txt")
    path.write_text("0 10 10 50 10 50 50")
    return [f"{path}, line 1", "'10'", "fractions of the image from 0 to 1"]


def class_out_of_range(root):
    path = first(root, "labels/val/*.txt")
    path.write_text("\n7 0.1 0.1 0.5 0.1 0.5 0.5")
    return [f"{path}, line 2", "class '7'", "classes 0 to 2"]


def odd_numbers(root):
    path = first(root, "labels/train/*.txt")
    path.write_text("0 0.1 0.1 0.5 0.1 0.5 0.5 0.9")
    return [str(path), "7 numbers", "even number"]


def two_points(root):
    path = first(root, "labels/train/*.txt")
    path.write_text("0 0.1 0.1 0.5")
    return [str(path), "3 numbers"]


def words_in_labels(root):
    path = first(root, "labels/train/*.txt")
    path.write_text("0 0.1 0.1 0.5 0.1 nan 0.5")
    return [str(path), "'nan'"]


def names_missing(root):
    rewrite(root / "data.yaml", ("names:", "names:\nother:"))
    return ["data.yaml", "names: [first, second, ...]"]


def other_number_of_names(root):
    rewrite(root / "data.yaml", ("nc: 3", "nc: 80"))
    return ["data.yaml", "3 names but nc: 80"]


def names_of_strings(root):
    path = root / "data.yaml"
    path.write_text("train: images/train\nnames:\n  cat: 0\n  dog: 1\n")
    return ["data.yaml", "'cat'", "0, 1, 2"]


def folder_of_another_computer(root):
    rewrite(root / "data.yaml", ("train: images/train", "train: /content/nowhere"))
    return ["data.yaml", "/content/nowhere", "correct the path"]


def folder_outside(root):
    outside = root.parent / "secret"
    outside.mkdir()
    Image.new("RGB", (9, 9)).save(outside / "a.png")
    rewrite(root / "data.yaml", ("train: images/train", f"train: {outside}"))
    return ["data.yaml", str(outside), "which is not in"]


def list_with_a_file_outside(root):
    (root / "train.txt").write_text("../../etc/passwd\n")
    rewrite(root / "data.yaml", ("train: images/train", "train: train.txt"))
    return ["train.txt", "etc/passwd", "which is not in"]


def broken_yaml(root):
    (root / "data.yaml").write_text("names: [a, b\ntrain: images/train\n")
    return ["data.yaml", "not valid YAML"]


def no_labels(root):
    for path in root.rglob("labels/train/*.txt"):
        path.unlink()
    return ["none of the 12 images", "labels/train"]


def not_an_image(root):
    path = first(root, "images/train/*.jpg")
    path.write_bytes(b"no image")
    return [str(path), "not an image"]


def absurd_size(root):
    path = first(root, "images/train/*.jpg")
    header = b"IHDR" + (60000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
    checksum = zlib.crc32(header).to_bytes(4, "big")
    path.write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\r" + header + checksum + b"\0\0\0\0IDAT")
    return [str(path), "claims more than 178 million pixels"]


YOLO = (pixels_instead_of_shares, class_out_of_range, odd_numbers, two_points, words_in_labels, names_missing)
YOLO += (other_number_of_names, names_of_strings, folder_of_another_computer, folder_outside, list_with_a_file_outside)
YOLO += (broken_yaml, no_labels, not_an_image, absurd_size)


# labelme


def shape_of_another_type(root):
    path = first(root, "train/*.json")
    change_json(path, lambda content: content["shapes"][0].update(shape_type="spline"))
    return [str(path), "'spline'", "polygon, rectangle, circle and mask"]


def polygon_of_two_points(root):
    path = first(root, "train/*.json")
    change_json(path, lambda content: content["shapes"][0].update(points=[[1, 1], [5, 5]]))
    return [str(path), "of 2 points", "needs 3 or more"]


def points_of_words(root):
    path = first(root, "train/*.json")
    change_json(path, lambda content: content["shapes"][0].update(points=[["1", "2"]] * 3))
    return [str(path), "at place 0", "list of x, y in pixels"]


def no_label(root):
    path = first(root, "val/*.json")
    change_json(path, lambda content: content["shapes"][1].pop("label"))
    return [str(path), "without a label at place 1"]


def size_of_another_image(root):
    path = first(root, "train/*.json")
    change_json(path, lambda content: content.update(imageHeight=480, imageWidth=640))
    return [str(path), "480x640", "96x96"]


def image_outside(root):
    path = first(root, "train/*.json")
    change_json(path, lambda content: content.update(imagePath="../../../../etc/hostname.jpg"))
    return [str(path), "etc/hostname.jpg", "which is not in"]


def image_gone(root):
    path = first(root, "train/*.jpg")
    path.unlink()
    return [path.stem, "which is not there; add it"]


def cut_short(root):
    path = first(root, "train/*.json")
    path.write_text(path.read_text()[:-30])
    return [str(path), "not valid JSON"]


LABELME = (shape_of_another_type, polygon_of_two_points, points_of_words, no_label, size_of_another_image)
LABELME += (image_outside, image_gone, cut_short)


# VOC


def entities(root):
    path = first(root, "Annotations/*.xml")
    path.write_text('<!DOCTYPE a [<!ENTITY b "bb">]><annotation>&b;</annotation>')
    return [str(path), "defines entities"]


def broken_xml(root):
    path = first(root, "Annotations/*.xml")
    path.write_text(path.read_text()[:-20])
    return [str(path), "not valid XML"]


def box_of_words(root):
    path = first(root, "Annotations/*.xml")
    rewrite(path, ("<xmin>", "<xmin>left"))
    return [str(path), "without xmin, ymin, xmax and ymax"]


def mask_of_another_size(root):
    path = first(root, "SegmentationObject/*.png")
    Image.new("L", (50, 40)).save(path)
    return [str(path), "40x50", "96x96"]


def listed_but_absent(root):
    (root / "ImageSets" / "Segmentation" / "train.txt").write_text("nowhere\n")
    return ["'nowhere'", "not in JPEGImages/"]


def no_images(root):
    for path in root.rglob("*.jpg"):
        path.unlink()
    return ["no images in JPEGImages/"]


VOC = (entities, broken_xml, box_of_words, mask_of_another_size, listed_but_absent, no_images)


def colour_without_a_name(root):
    rewrite(root / "labelmap.txt", ("128,0,0", "1,2,3"))
    return ["SegmentationObject", "whose colour in SegmentationClass/ has no name", "labelmap.txt"]


def labelmap_of_something_else(root):
    (root / "labelmap.txt").write_text("cat 1 2 3\n")
    return ["labelmap.txt, line 1", "name:red,green,blue::"]


# Instance masks


def photograph_as_mask(root):
    path = first(root, "train/masks/circle/*.png")
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)
    cv2.imwrite(str(path), noise)
    cv2.imwrite(str(root / "train" / "images" / f"{path.stem}.jpg"), noise)
    for other in ("heart", "ring"):
        (root / "train" / "masks" / other / path.name).unlink()
    return [str(path), "photograph", "each object needs one value or colour"]


def jpeg_as_mask(root):
    path = first(root, "train/masks/circle/*.png")
    Image.new("L", (96, 96)).save(path, "JPEG")
    return [str(path), "PNG or TIFF"]


def broken_mask(root):
    path = first(root, "train/masks/circle/*.png")
    path.write_bytes(path.read_bytes()[:60])
    return [str(path), "cannot be decoded"]


def shares_as_mask(root):
    path = first(root, "train/masks/circle/*.png")
    Image.fromarray(np.full((96, 96), 0.5, np.float32)).save(path, "TIFF")
    return [str(path), "whole numbers"]


def stack_of_pages(root):
    path = first(root, "train/masks/circle/*.png")
    page = Image.new("L", (96, 96))
    page.save(path, "TIFF", save_all=True, append_images=[page])
    return [str(path), "cannot be decoded"]


def mask_gone(root):
    stem = first(root, "train/masks/circle/*.png").stem
    for path in root.rglob(f"{stem}.png"):
        path.unlink()
    return [f"{stem}.jpg has no mask of its name"]


MASKS = (photograph_as_mask, jpeg_as_mask, broken_mask, shares_as_mask, stack_of_pages, mask_gone)


# COCO's format


def name_outside(root):
    path = first(root, "train/_annotations.coco.json")
    change_json(path, lambda content: content["images"][0].update(file_name="../../../etc/passwd"))
    return [str(path), "etc/passwd", "which is not in"]


def image_missing(root):
    path = first(root, "train/*.jpg")
    path.unlink()
    return [path.name, "which is not in"]


CASES = [(yolo, damage) for damage in YOLO] + [(labelme, damage) for damage in LABELME]
CASES += [(voc, damage) for damage in VOC] + [(masks_by_class, damage) for damage in MASKS]
CASES += [(voc_in_colours, damage) for damage in (colour_without_a_name, labelmap_of_something_else)]
CASES += [(roboflow, damage) for damage in (name_outside, image_missing)]


@pytest.mark.parametrize(("writer", "damage"), CASES, ids=lambda function: function.__name__)
def test_a_wrong_file_is_refused_and_nothing_is_left(shapes_parts, tmp_path, writer, damage):
    root, out = tmp_path / "in", tmp_path / "out"
    writer(root, shapes_parts)
    words = damage(root)
    with pytest.raises(UserError) as error:
        convert(root, out)
    assert_sentence(error.value)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert not [path for path in tmp_path.iterdir() if path.name not in ("in", "secret")]


@pytest.mark.parametrize("files", [(), ("notes.txt",), ("a/b/c.jpg",), ("a.json",), ("images/a.jpg",)])
def test_what_is_no_dataset_is_said_with_what_is_there(tmp_path, files):
    (tmp_path / "in").mkdir()
    for name in files:
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    with pytest.raises(UserError, match="which is no known layout; give a dataset in COCO's format, YOLO's") as error:
        convert(tmp_path / "in", tmp_path / "out")
    assert all(name.partition("/")[0] in str(error.value) for name in files) and (
        "nothing" in str(error.value)
    ) ^ bool(files)


def test_a_folder_that_holds_something_is_not_overwritten(shapes_parts, tmp_path):
    yolo(tmp_path / "in", shapes_parts)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("1")
    with pytest.raises(UserError, match="exists already"):
        convert(tmp_path / "in", tmp_path / "out")


def test_an_image_is_never_written_through_a_link(shapes_parts, tmp_path):
    roboflow(tmp_path / "in", shapes_parts)
    path = first(tmp_path / "in", "train/_annotations.coco.json")
    names = [image["file_name"] for image in json.loads(path.read_text())["images"][:2]]
    before = (path.parent / names[0]).read_bytes()
    change_json(path, lambda content: content["images"][1].update(file_name=f"./{names[0]}"))
    with pytest.raises(UserError, match="two images would be written as"):
        convert(tmp_path / "in", tmp_path / "out")
    assert (path.parent / names[0]).read_bytes() == before


def test_images_are_copied_if_wanted(shapes_parts, tmp_path):
    yolo(tmp_path / "in", shapes_parts)
    convert(tmp_path / "in", tmp_path / "linked")
    convert(tmp_path / "in", tmp_path / "copied", copy=True)
    for path in (tmp_path / "linked").rglob("*.jpg"):
        copied = tmp_path / "copied" / path.relative_to(tmp_path / "linked")
        assert path.is_symlink() and not copied.is_symlink()
        assert path.read_bytes() == copied.read_bytes()


@pytest.mark.parametrize("name", [b"caf\xe9", b"two\nlines"])
@pytest.mark.parametrize(("write", "places"), [(yolo, ("images", "labels")), (labelme, ("", ""))])
def test_a_file_name_that_the_reader_refuses_stops_before_anything_is_written(
    shapes_parts, tmp_path, write, places, name
):
    write(tmp_path / "in", shapes_parts)
    images, labels = (tmp_path / "in" / place / "train" for place in places)
    image = first(images, "*.[jp][pn]g")
    for path in (image, first(labels, f"{image.stem}.*[tj][xs][to]*")):
        path.rename(os.fsdecode(os.fsencode(path.parent) + b"/" + name + os.fsencode(path.suffix)))
    with pytest.raises(UserError, match="has a line break or is not UTF-8; rename the file") as error:
        convert(tmp_path / "in", tmp_path / "out")
    assert_sentence(error.value)
    assert not (tmp_path / "out").exists()
