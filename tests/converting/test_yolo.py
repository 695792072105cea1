"""YOLO's labels: boxes, images that are shown turned, and names that YAML would take for something else."""

import numpy as np
import pytest
from PIL import Image, ImageOps

from maskrcnn_jax.converting.convert import convert
from maskrcnn_jax.data.dataset import load_coco
from maskrcnn_jax.data.findings import Kind


def write(root, lines, *, names="[cat, dog]", orientation=1):
    (root / "images").mkdir(parents=True)
    (root / "labels").mkdir()
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.zeros((60, 80), np.uint8)
    stored[4:12, 50:74] = 255
    Image.fromarray(stored).save(root / "images" / "a.png", exif=exif)
    (root / "labels" / "a.txt").write_text("\n".join(lines))
    (root / "data.yaml").write_text(f"train: images\nnames: {names}\n")
    return np.asarray(ImageOps.exif_transpose(Image.open(root / "images" / "a.png"))) > 0


def converted(root):
    convert(root, root.parent / "out")
    return load_coco(root.parent / "out", "train")


def test_a_line_of_four_numbers_is_a_box(tmp_path):
    write(tmp_path / "in", ["1 0.5 0.5 0.25 0.1"])
    index = converted(tmp_path / "in")
    np.testing.assert_allclose(index.boxes, [[30, 27, 50, 33]])
    assert index.problems == {Kind.ONLY_BOX: 1} and index.categories.name(index.labels[0]) == "dog"


@pytest.mark.parametrize("as_box", [False, True])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_labels_of_an_image_shown_turned_are_turned_back(tmp_path, orientation, as_box):
    shown = write(tmp_path / "in", [], orientation=orientation)
    ys, xs = np.nonzero(shown)
    size = shown.shape[::-1]
    (x1, y1), (x2, y2) = np.array([[xs.min(), ys.min()], [xs.max() + 1, ys.max() + 1]]) / size
    numbers = [(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1] if as_box else [x1, y1, x2, y1, x2, y2, x1, y2]
    (tmp_path / "in" / "labels" / "a.txt").write_text(" ".join(["0", *map("{:.6f}".format, numbers)]))
    index = converted(tmp_path / "in")
    np.testing.assert_allclose(index.boxes, [[50, 4, 74, 12]], atol=1e-3)


def test_coordinates_of_cocos_precision_come_back(tmp_path):
    # Of 10.1, rounded as a fraction of 80, pycocotools would take another pixel.
    polygon = [10.1, 10.3, 33.35, 12.7, 20.9, 44.44, 10.1, 30.1]
    shares = np.array(polygon).reshape(-1, 2) / (80, 60)
    write(tmp_path / "in", [" ".join(["0", *map("{:.6f}".format, shares.ravel())])])
    np.testing.assert_array_equal(converted(tmp_path / "in").coordinates, polygon)


def test_names_that_yaml_takes_for_truth_or_nothing_stay_names(tmp_path):
    write(tmp_path / "in", [], names="[no, on, null, 1]")
    assert converted(tmp_path / "in").categories.names == ("no", "on", "null", "1")


def test_the_names_may_be_in_classes_txt(tmp_path):
    write(tmp_path / "in", ["1 0.1 0.1 0.5 0.1 0.5 0.5"])
    (tmp_path / "in" / "data.yaml").unlink()
    (tmp_path / "in" / "classes.txt").write_text("cat\ndog\n")
    index = converted(tmp_path / "in")
    assert index.categories.names == ("cat", "dog") and index.labels.tolist() == [2]


def test_images_may_be_in_a_list(tmp_path):
    write(tmp_path / "in", ["0 0.1 0.1 0.5 0.1 0.5 0.5"])
    (tmp_path / "in" / "train.txt").write_text("./images/a.png\n")
    (tmp_path / "in" / "data.yaml").write_text("path: /elsewhere/in\ntrain: train.txt\nnames: {0: cat}\n")
    assert converted(tmp_path / "in").file_names.tolist() == ["a.png"]


@pytest.mark.parametrize(
    "line", ["data/images/a.png", "/content/in/images/a.png", ".\\images\\a.png", "C:\\Users\\me\\in\\images\\a.png"]
)
def test_paths_may_be_those_of_another_computer(tmp_path, line):
    write(tmp_path / "in", ["0 0.1 0.1 0.5 0.1 0.5 0.5"])
    (tmp_path / "in" / "train.txt").write_text(line + "\r\n")
    folder = line.removesuffix("a.png").rstrip("\\/")
    (tmp_path / "in" / "data.yaml").write_text(f"train: train.txt\nval: {folder}\nnames: {{0: cat}}\n")
    assert converted(tmp_path / "in").file_names.tolist() == ["a.png"]
    assert len(load_coco(tmp_path / "out", "val").labels) == 1


def test_a_test_split_that_is_only_named_is_left_out_with_a_warning(tmp_path, caplog):
    write(tmp_path / "in", [])
    with (tmp_path / "in" / "data.yaml").open("a") as file:
        file.write("test: ../images/test\n")
    assert convert(tmp_path / "in", tmp_path / "out") == {"train": (1, 0)}
    assert "names '../images/test' as its test split, which is not there" in caplog.text


def test_marks_that_windows_and_macos_add_are_passed_over(tmp_path):
    write(tmp_path / "in", [])
    (tmp_path / "in" / "images" / "._a.png").write_bytes(b"\0\5\x16\7")
    (tmp_path / "in" / "data.yaml").write_text("\ufeffnames: [cat, dog]\r\ntrain: images\r\n")
    assert converted(tmp_path / "in").file_names.tolist() == ["a.png"]


@pytest.mark.parametrize(("image", "label"), [("a b", "a%20b"), ("caf\u00e9", "cafe\u0301"), ("a%20b%2F", "a b%2F")])
def test_labels_are_found_whatever_the_form_of_their_name(tmp_path, image, label):
    write(tmp_path / "in", ["0 0.1 0.1 0.5 0.1 0.5 0.5"])
    (tmp_path / "in" / "images" / "a.png").rename(tmp_path / "in" / "images" / f"{image}.png")
    (tmp_path / "in" / "labels" / "a.txt").rename(tmp_path / "in" / "labels" / f"{label}.txt")
    assert len(converted(tmp_path / "in").labels) == 1
