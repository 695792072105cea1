"""Data of pages with images: what the browser reads is what was written, within the limits."""

import json

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask

from maskrcnn_jax import gallery, page


def unpack(packed):
    """As gallery.js does."""
    import base64

    return np.frombuffer(base64.b64decode(packed["base64"]), packed["type"])


def encode(mask):
    return coco_mask.encode(np.asfortranarray(mask, np.uint8))


def redraw(outlines, index, shape):
    """Fill the outlines of a mask as a browser does."""
    offsets, points = unpack(outlines["offsets"]), unpack(outlines["points"])
    at, end, polygons = offsets[index], offsets[index + 1], []
    while at < end:
        count = int(points[at])
        polygons.append(points[at + 1 : at + 1 + 2 * count].reshape(-1, 2).astype(np.int32))
        at += 1 + 2 * count
    canvas = np.zeros(shape, np.uint8)
    cv2.fillPoly(canvas, polygons, 1)
    return canvas


@pytest.mark.parametrize("shape", ["disc", "ring", "two parts", "thin"])
def test_an_outline_covers_nearly_what_the_mask_covers(shape):
    mask = np.zeros((120, 200), np.uint8)
    cv2.circle(mask, (70, 60), 40, 1, -1 if shape != "ring" else 12)
    if shape == "two parts":
        cv2.rectangle(mask, (150, 20), (180, 90), 1, -1)
    if shape == "thin":
        mask[:] = 0
        mask[40:60, 10:190] = 1
    found = redraw(gallery.outlines([0], 1, lambda i: gallery.trace_mask(encode(mask))), 0, mask.shape)
    overlap = (found & mask).sum() / (found | mask).sum()
    assert overlap > 0.94


def test_masks_without_an_outline_are_none():
    assert gallery.trace_mask(encode(np.zeros((10, 10)))) == []
    single = np.zeros((10, 10))
    single[4, 4] = 1
    assert gallery.trace_mask(encode(single)) == []
    assert gallery.trace_mask({"size": [10, 10], "counts": b"0"}) == [], "too few pixels"


def test_outlines_fill_their_limit_the_most_important_first():
    square = [np.array([[0, 0], [9, 0], [9, 9], [0, 9]])]
    size = 2 * (1 + 8)  # bytes
    outlines = gallery.outlines([2, 0, 1], 3, lambda i: square, limit=2 * size)
    assert np.diff(unpack(outlines["offsets"])).tolist() == [9, 0, 9]


def test_thumbnails_fill_their_limit_and_skip_what_cannot_be_read():
    image = np.random.default_rng(0).integers(0, 255, (600, 900, 3), dtype=np.uint8)
    size = len(page.image_source(cv2.resize(image, (480, 320), interpolation=cv2.INTER_AREA), quality=75))
    read = {3: image, 5: None, 1: image, 2: image}.get
    assert list(gallery.thumbnails([3, 5, 1, 2], read, limit=size + 1)) == [3, 1]
    assert list(gallery.thumbnails([3, 5, 1, 2], read)) == [3, 1, 2]


def test_objects_are_found_by_their_image():
    data = gallery.instances(
        np.array([0, 0, 2]), 4, np.array([1, 0, 1]), np.zeros((3, 4)), np.array([1023, 1024, 96**2]), {}
    )
    assert unpack(data["offsets"]).tolist() == [0, 2, 2, 3, 3]
    assert unpack(data["sizes"]).tolist() == [0, 1, 2]


def test_links_lead_from_the_page_to_the_image(tmp_path):
    image = tmp_path / "images" / "a b.jpg"
    image.parent.mkdir()
    image.touch()
    link = tmp_path / "link.jpg"
    link.symlink_to(image)
    assert gallery.link(link, tmp_path / "pages" / "page.html") == "../images/a b.jpg"
    assert gallery.link(None, tmp_path / "page.html") == ""


def test_embedded_data_cannot_end_its_element():
    data = {"</script>": ["<!--", "&amp;", "\u2028", "\udcff", "\U0001f600"]}
    text = str(page.embed(data))
    assert not set("<>&") & set(text) and text.isascii()
    assert json.loads(text) == data


def test_rows_are_evenly_spread():
    assert gallery.spread(10, 4).tolist() == [0, 3, 6, 9]
    assert gallery.spread(2, 4).tolist() == [0, 1]
    assert gallery.spread(0, 4).tolist() == []


def test_a_class_has_one_colour():
    named = gallery.classes(["a", "b", "a"])
    assert [entry["colour"] for entry in named] == [gallery.colour(i) for i in range(3)]
    assert len({gallery.colour(i) for i in range(80)}) == 80
