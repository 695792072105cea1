"""Instance masks that are images: bits, colours, holes, and what many objects cost."""

import contextlib
import logging
import re
import tracemalloc
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from maskrcnn_jax.converting.convert import convert
from maskrcnn_jax.converting.label_map import read_label_map, regions
from maskrcnn_jax.data.dataset import load_coco
from maskrcnn_jax.errors import UserError
from tests.limits import cpu_time_below


def decoded(region):
    return coco_mask.decode(region.rle | {"counts": region.rle["counts"].encode()})


@pytest.mark.parametrize("seed", range(5))
def test_regions_are_the_masks_of_the_values(tmp_path, seed):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 5, (7, 9))
    labels = np.kron(coarse, np.ones((5, 6), np.int64)) * rng.integers(1, 1 << 40)
    found = regions(labels, tmp_path)
    assert [region.value for region in found] == [value for value in np.unique(labels).tolist() if value]
    for region in found:
        expected = np.asfortranarray(labels == region.value, np.uint8)
        np.testing.assert_array_equal(decoded(region), expected)
        assert region.area == expected.sum()
        ys, xs = np.nonzero(expected)
        x, y, width, height = region.box
        assert (x, y, x + width, y + height) == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)


def test_an_object_of_one_pixel_in_a_corner_and_one_that_fills_the_image(tmp_path):
    for corner in ((0, 0), (0, 5), (3, 0), (3, 5)):
        labels = np.zeros((4, 6), np.int64)
        labels[corner] = 9
        (region,) = regions(labels, tmp_path)
        np.testing.assert_array_equal(decoded(region), labels > 0)
    (region,) = regions(np.ones((4, 6), np.int64), tmp_path)
    assert decoded(region).all()
    assert regions(np.zeros((4, 6), np.int64), tmp_path) == []


LABELS = np.kron(np.array([[0, 1, 2], [3, 3, 0], [2, 700, 4]]), np.ones((8, 8), int))


@pytest.mark.parametrize(
    ("suffix", "dtype"), [(".png", np.uint8), (".png", np.uint16), (".tif", np.uint8), (".tif", np.uint16)]
)
def test_grey_files_hold_their_values(tmp_path, suffix, dtype):
    labels = LABELS.astype(dtype)
    cv2.imwrite(str(tmp_path / f"a{suffix}"), labels)
    np.testing.assert_array_equal(read_label_map(tmp_path / f"a{suffix}", labels.shape), labels)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_tiffs_of_32_bits_hold_their_values(tmp_path, mode):
    Image.fromarray(LABELS.astype(np.int32 if mode == "I" else np.float32)).save(tmp_path / "a.tif")
    np.testing.assert_array_equal(read_label_map(tmp_path / "a.tif", LABELS.shape), LABELS)


def same_partition(a, b):
    """Whether two label maps tell the same objects apart, and have the same background."""
    pairs = np.unique(np.stack([a.ravel(), b.ravel()]), axis=1).T
    return len(np.unique(pairs[:, 0])) == len(np.unique(pairs[:, 1])) == len(pairs) and [0, 0] in pairs.tolist()


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_colours_tell_objects_apart_also_by_their_lower_bits(tmp_path, dtype, suffix):
    high = np.iinfo(dtype).max
    palette = {
        0: (0, 0, 0),
        1: (0, 0, 1),
        2: (0, 1, 0),
        3: (1, 0, 0),
        4: (high, high, high),
        700: (high, high, high - 1),
    }
    colours = np.zeros((*LABELS.shape, 3), dtype)
    for value, colour in palette.items():
        colours[value == LABELS] = colour
    cv2.imwrite(str(tmp_path / f"a{suffix}"), colours)
    assert same_partition(LABELS, read_label_map(tmp_path / f"a{suffix}", LABELS.shape))


def test_indices_of_a_palette_tell_objects_of_one_colour_apart(tmp_path):
    image = Image.fromarray((LABELS % 256).astype(np.uint8), "P")
    image.putpalette([0, 0, 0] * 256)
    image.save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_label_map(tmp_path / "a.png", LABELS.shape), LABELS % 256)


def test_what_is_transparent_is_background(tmp_path):
    pixels = np.full((*LABELS.shape, 4), 90, np.uint8)
    pixels[..., 3] = np.where(LABELS == 3, 255, 0)
    cv2.imwrite(str(tmp_path / "a.png"), pixels)
    np.testing.assert_array_equal(read_label_map(tmp_path / "a.png", LABELS.shape) > 0, LABELS == 3)


def test_thousands_of_objects_cost_no_more_than_the_pixels(tmp_path):
    labels = np.zeros((2000, 2000), np.int64)
    labels[:] = np.kron(np.arange(2500).reshape(50, 50), np.ones((40, 40), np.int64))
    tracemalloc.start()
    try:
        with cpu_time_below(5):
            found = regions(labels, tmp_path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(found) == 2499
    assert peak < 6 * labels.nbytes  # a raster of each object would take 10 GB


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_chunk_that_claims_gigabytes_takes_none(tmp_path, dtype):
    cv2.imwrite(str(tmp_path / "a.png"), np.dstack([LABELS] * 3).astype(dtype))
    data = (tmp_path / "a.png").read_bytes()
    start = data.index(b"IDAT") - 4
    (tmp_path / "a.png").write_bytes(data[:start] + b"\xff\xff\xff\xff" + data[start + 4 :])
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    with contextlib.suppress(UserError):
        read_label_map(tmp_path / "a.png", LABELS.shape)
    assert peak() < before + (100 << 20)


def peak():
    """Returns the most memory of the process since it was last cleared, in bytes."""
    return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) << 10


def write(folder, name, array):
    folder.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(folder / name), array.astype(np.uint8))


def write_beside(root):
    for stem in ("a", "b"):
        write(root / "train", f"{stem}_img.png", LABELS)
        write(root / "train", f"{stem}_masks.png", LABELS % 256)


def write_cellpose(root):
    for stem in ("a", "b"):
        write(root, f"{stem}.png", LABELS)
        write(root, f"{stem}_cp_masks.png", LABELS % 256)


def write_with_beginnings(root):
    for stem in ("a", "b"):
        write(root / "image", f"img_{stem}.png", LABELS)
        write(root / "label", f"mask_{stem}.png", LABELS % 256)


def write_in_splits(root):
    for stem in ("a", "b"):
        write(root / "images" / "train", f"{stem}.png", LABELS)
        write(root / "masks" / "train", f"{stem}_mask.tif", LABELS % 256)


def write_a_mask_for_each_object(root):
    for stem in ("a", "b"):
        write(root / "stage1_train" / stem / "images", f"{stem}.png", LABELS)
        for value in (1, 2, 3, 4, 700):
            write(root / "stage1_train" / stem / "masks", f"{value}.png", (value == LABELS) * 255)


_SETS = (write_beside, write_cellpose, write_with_beginnings, write_in_splits, write_a_mask_for_each_object)


@pytest.mark.parametrize("write_set", _SETS)
def test_images_are_found_with_their_masks(tmp_path, write_set):
    write_set(tmp_path / "in")
    found = convert(tmp_path / "in", tmp_path / "out", class_name="nucleus")
    assert list(found.values()) == [(2, 10)]
    index = load_coco(tmp_path / "out", "train")
    assert index.categories.names == ("nucleus",)
    for i in range(2):
        assert sorted(mask.tobytes() for mask in index.masks(i)) == sorted(
            (value == LABELS).astype(np.uint8).tobytes() for value in (1, 2, 3, 4, 700)
        )


@pytest.mark.parametrize("semantic", [True, False])
def test_masks_that_seem_semantic_are_warned_of(tmp_path, caplog, semantic):
    for stem in ("a", "b"):
        write(tmp_path / "in" / "images", f"{stem}.png", LABELS)
        write(tmp_path / "in" / "masks", f"{stem}.png", (LABELS == 2) * 255 if semantic else LABELS % 256)
    with caplog.at_level(logging.WARNING, "maskrcnn_jax"):
        convert(tmp_path / "in", tmp_path / "out")
    assert ("no mask has more than one value, though 2 have separate parts" in caplog.text) == semantic


def nuclei(root, *objects):
    """Writes a folder for each image, with a mask for each of its objects; None for no folder of masks."""
    for i, number in enumerate(objects):
        folder = root / f"n{i}"
        (folder / "images").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / "images" / f"n{i}.png")
        if number is not None:
            (folder / "masks").mkdir()
        for k in range(number or 0):
            Image.fromarray(np.eye(8, k=k, dtype=np.uint8) * 255).save(folder / "masks" / f"{k}.png")
    return root


def test_an_image_with_a_mask_for_each_object_may_have_none(tmp_path):
    assert convert(nuclei(tmp_path / "in", 2, 0, 1), tmp_path / "out") == {"train": (3, 3)}


def test_an_image_without_a_folder_of_masks_is_named(tmp_path):
    with pytest.raises(UserError, match=r"n1/images/n1\.png has no folder of masks"):
        convert(nuclei(tmp_path / "in", 2, None, 1), tmp_path / "out")
