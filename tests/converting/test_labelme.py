"""labelme's shapes: their outlines, groups and masks, and images that it shows turned."""

import base64
import json
import logging
import math

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from maskrcnn_jax.converting.convert import convert
from maskrcnn_jax.data.dataset import load_coco


def write(root, shapes, *, size=(60, 80), orientation=1, folder=""):
    """Writes an image, of a (height, width) as stored, and its JSON."""
    root.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.zeros((*size, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(root / "a.jpg", exif=exif)
    height, width = size[::-1] if orientation > 4 else size
    content = {"shapes": shapes, "imagePath": "a.jpg", "imageHeight": height, "imageWidth": width}
    (root / "a.json").write_text(json.dumps(content))


def shape(points, kind="polygon", label="cat", group=None, **fields):
    return {"label": label, "points": points, "shape_type": kind, "group_id": group} | fields


def converted(tmp_path, shapes, **options):
    write(tmp_path / "in", shapes, **options)
    convert(tmp_path / "in", tmp_path / "out")
    return load_coco(tmp_path / "out", "train")


def test_a_rectangle_is_given_by_any_two_corners(tmp_path):
    index = converted(tmp_path, [shape([[30, 10], [12.5, 50]], "rectangle")])
    np.testing.assert_allclose(index.boxes, [[12.5, 10, 30, 50]])
    assert abs(index.masks(0).sum() - 17.5 * 40) <= 20


def test_a_circle_is_given_by_its_middle_and_a_point_of_its_border(tmp_path):
    index = converted(tmp_path, [shape([[40, 30], [40, 50]], "circle")])
    np.testing.assert_allclose(index.boxes, [[20, 10, 60, 50]], atol=1e-4)
    assert index.masks(0).sum() == pytest.approx(math.pi * 20**2, rel=0.01)


def test_shapes_of_a_group_are_parts_of_one_object(tmp_path):
    left, right = [[5, 5], [20, 5], [20, 20], [5, 20]], [[40, 5], [60, 5], [60, 20], [40, 20]]
    shapes = [shape(left, group=3), shape(right, group=3), shape(left, group=4), shape(right, label="dog", group=3)]
    index = converted(tmp_path, [*shapes, shape(right), shape(right)])
    found = [index.categories.name(label) for label in index.labels]
    assert sorted(found) == ["cat", "cat", "cat", "cat", "dog"]
    np.testing.assert_allclose(index.boxes[0], [5, 5, 60, 20])
    assert index.num_parts[0] == 2
    assert index.masks(0)[0].sum() == 15 * 15 + 20 * 15


def test_points_and_lines_are_left_out_with_a_warning(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "maskrcnn_jax"):
        shapes = [shape([[1, 1]], "point", "tip"), shape([[1, 1], [9, 9]], "line"), shape([[1, 1], [9, 1], [5, 9]])]
        index = converted(tmp_path, shapes)
    assert len(index.labels) == 1 and index.categories.names == ("cat",)
    assert "2 points and lines are left out" in caplog.text


def test_a_mask_lies_at_its_first_point(tmp_path):
    pixels = np.zeros((11, 21), np.uint8)
    pixels[3:9, 2:20] = 255
    pixels[5, 7] = 0  # a hole
    png = base64.b64encode(cv2.imencode(".png", pixels)[1].tobytes()).decode()
    index = converted(tmp_path, [shape([[30, 20], [50, 30]], "mask", mask=png)])
    expected = np.zeros((60, 80), np.uint8)
    expected[20:31, 30:51] = pixels > 0
    np.testing.assert_array_equal(index.masks(0)[0], expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_points_of_an_image_shown_turned_are_turned_back(tmp_path, orientation):
    # The corner of the stored image that is marked is found where it is shown.
    stored = np.zeros((60, 80), np.uint8)
    stored[4:12, 50:74] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    shown = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "a.png"))) > 0
    ys, xs = np.nonzero(shown)
    corners = [[int(xs.min()), int(ys.min())], [int(xs.max()) + 1, int(ys.max()) + 1]]
    index = converted(tmp_path / "set", [shape(corners, "rectangle")], orientation=orientation)
    np.testing.assert_array_equal(index.boxes, [[50, 4, 74, 12]])
    np.testing.assert_array_equal(index.masks(0)[0], stored > 0)


def test_images_may_lie_in_another_folder_than_their_json(tmp_path):
    write(tmp_path / "in" / "images", [])
    content = {"shapes": [shape([[1, 1], [9, 1], [5, 9]])], "imagePath": "..\\images\\a.jpg"}
    (tmp_path / "in" / "labels").mkdir()
    (tmp_path / "in" / "labels" / "a.json").write_text(json.dumps(content))
    (tmp_path / "in" / "images" / "a.json").unlink()
    convert(tmp_path / "in", tmp_path / "out")
    index = load_coco(tmp_path / "out", "train")
    assert index.file_names.tolist() == ["images/a.jpg"]
    assert index.read_image(0).shape == (60, 80, 3)


@pytest.mark.parametrize("given", ["/home/me/a.jpg", "../a.jpg", "C:\\Users\\me\\a.jpg", "\\\\server\\share\\a.jpg"])
def test_the_path_of_an_image_may_be_of_another_computer_if_it_lies_beside_its_json(tmp_path, given):
    write(tmp_path / "in", [])
    content = {"shapes": [shape([[1, 1], [9, 1], [5, 9]])], "imagePath": given}
    (tmp_path / "in" / "b.json").write_text(json.dumps(content))
    (tmp_path / "in" / "a.json").unlink()
    assert convert(tmp_path / "in", tmp_path / "out") == {"train": (1, 1)}
