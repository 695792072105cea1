"""Pascal VOC's XML: boxes in images that are shown turned, and sizes that belong to another image."""

import numpy as np
import pytest
from PIL import Image, ImageOps

from maskrcnn_jax.converting.convert import convert
from maskrcnn_jax.data.dataset import load_coco
from maskrcnn_jax.errors import UserError

XML = """<annotation><size><width>{width}</width><height>{height}</height></size><object><name>cat</name>
<bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object></annotation>"""


def write(root, *, orientation=1):
    """Write an image with a bright box; returns the image as it is shown."""
    for folder in ("JPEGImages", "Annotations"):
        (root / folder).mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.zeros((60, 80), np.uint8)
    stored[4:12, 50:74] = 255
    Image.fromarray(stored).save(root / "JPEGImages" / "a.png", exif=exif)
    with Image.open(root / "JPEGImages" / "a.png") as opened:
        return np.asarray(ImageOps.exif_transpose(opened)) > 0


def boxes(root, shown, size):
    """Annotate the bright box of an image for (height, width) ``size``, and return the boxes that are converted."""
    ys, xs = np.nonzero(shown)
    numbers = {"x1": xs.min() + 1, "y1": ys.min() + 1, "x2": xs.max() + 1, "y2": ys.max() + 1}
    (root / "Annotations" / "a.xml").write_text(XML.format(height=size[0], width=size[1], **numbers))
    convert(root, root.parent / "out")
    return load_coco(root.parent / "out", "train").boxes


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_boxes_of_an_image_shown_turned_are_turned_back(tmp_path, orientation):
    shown = write(tmp_path / "in", orientation=orientation)
    assert shown.shape == (80, 60)
    np.testing.assert_array_equal(boxes(tmp_path / "in", shown, shown.shape), [[50, 4, 74, 12]])


@pytest.mark.parametrize(
    ("orientation", "size"),
    [(6, (60, 80)), (6, (0, 0)), (1, (80, 60))],
    ids=["as stored", "not stated", "height and width exchanged"],
)
def test_boxes_that_are_not_turned_stay(tmp_path, orientation, size):
    write(tmp_path / "in", orientation=orientation)
    with Image.open(tmp_path / "in" / "JPEGImages" / "a.png") as opened:
        stored = np.asarray(opened)
    np.testing.assert_array_equal(boxes(tmp_path / "in", stored, size), [[50, 4, 74, 12]])


@pytest.mark.parametrize("size", [(60, 80), (0, 0)])
def test_orientations_that_the_xml_does_not_confirm_are_warned_of(tmp_path, caplog, size):
    write(tmp_path / "in", orientation=3)
    with Image.open(tmp_path / "in" / "JPEGImages" / "a.png") as opened:
        boxes(tmp_path / "in", np.asarray(opened), size)
    assert "1 images have an EXIF orientation" in caplog.text


def test_exchanged_corners_are_no_box(tmp_path):
    write(tmp_path / "in")
    xml = XML.format(height=60, width=80, x1=50, y1=5, x2=10, y2=9)
    (tmp_path / "in" / "Annotations" / "a.xml").write_text(xml)
    with pytest.raises(UserError, match="boxes without area"):
        convert(tmp_path / "in", tmp_path / "out")


def test_annotations_of_another_image_are_refused(tmp_path):
    shown = write(tmp_path / "in")
    with pytest.raises(UserError, match=r"a\.xml is for an image of 30x40 pixels .* has 60x80"):
        boxes(tmp_path / "in", shown, (30, 40))
