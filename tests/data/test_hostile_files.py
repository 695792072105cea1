"""Whatever lies in an annotation file or an image: it is read, or refused in a sentence."""

import contextlib
import json
import tempfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from maskrcnn_jax.checking.dataset import check_split
from maskrcnn_jax.data.dataset import read_dataset
from maskrcnn_jax.data.images import BrokenImageError, UndecodableError, check_and_decode, decode_image
from maskrcnn_jax.data.run_lengths import is_well_formed, num_pixels
from maskrcnn_jax.options import DataOptions, ModelOptions, Options
from tests.hostile import CASES, NUMBERS, assert_sentence, change_document, changes, damage_bytes, damages, hostile

_HELD = tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
_FOLDER = Path(_HELD.name)
_JSON, _IMAGES = _FOLDER / "a.json", _FOLDER / "images"
_IMAGES.mkdir()
_PIXELS = np.random.default_rng(0).integers(0, 256, (20, 24, 4), np.uint8)
for _i in (1, 2, 3):
    cv2.imwrite(str(_IMAGES / f"{_i}.jpg"), _PIXELS[..., :3])
_RLE = coco_mask.encode(np.asfortranarray(_PIXELS[..., 0] > 200, np.uint8))["counts"].decode()
_OPTIONS = Options(
    model=ModelOptions(anchor_sizes=(8, 16, 32)), data=DataOptions(short_side=64, long_side=96, threads=1)
)
_KEEPING = Options(data=DataOptions(ignore_regions=True))


def _document():
    triangle, square = [1, 1, 15, 1.5, 1, 9], [2, 2, 12, 2, 12, 12, 2, 12]
    forms = [
        {"bbox": [1, 1, 14, 8], "segmentation": [triangle]},
        {"bbox": [1, 1, 14, 11], "segmentation": [triangle, square]},
        {"bbox": [0, 0, 24, 20], "segmentation": {"size": [20, 24], "counts": _RLE}, "iscrowd": 1},
        {"segmentation": {"size": [20, 24], "counts": [30, 50, 400]}},
        {"segmentation": [square], "area": 100},
        {"bbox": [3, 4, 10, 5]},
    ]
    annotations = [
        {"id": i + 1, "image_id": i % 3 + 1, "category_id": i % 2 + 1} | form for i, form in enumerate(forms)
    ]
    images = [{"id": i, "file_name": f"{i}.jpg", "height": 20, "width": 24} for i in (1, 2, 3)]
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


_TEXT = json.dumps(_document())


def _read(data, times=1):
    """Reads an annotation file as training and as the checker do, and what it lists."""
    _JSON.write_bytes(data)
    for split in (
        check_split("train", _JSON, _IMAGES, _OPTIONS, open_images=times % 4 == 0),
        check_split("val", _JSON, _IMAGES, _KEEPING, open_images=False, evaluated=True),
    ):
        for finding in split.findings:
            assert_sentence(finding.sentence)
    index = read_dataset(_JSON, _IMAGES, skip_broken=True, keep_unlisted=bool(times % 2)).without_flat()
    for i in range(min(len(index), 4)):
        objects = index.annotations(i, with_crowd=True)
        assert np.isfinite(objects.boxes).all() and (objects.boxes[:, 2:] > objects.boxes[:, :2]).all()
        try:
            image = index.read_image(i)
        except BrokenImageError as e:
            assert_sentence(e)
            continue
        assert index.masks(i, with_crowd=True).shape == (len(objects.ids), *image.shape[:2])


def _dumps(document):
    return json.dumps(document, ensure_ascii=False).encode("utf-8", "surrogatepass")


@pytest.mark.slow
@hostile("annotations", changes=changes, times=st.integers(0, 7))
def test_hostile_annotations_are_read_or_refused(changes, times):
    document = change_document(json.loads(_TEXT), changes)
    _read(json.dumps(document).encode(), times)


_TOKENS = [b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"\\u", b"\\ud800", b"1e999", b"-", b"9" * 5000, b"NaN"]
_TOKENS += [b"[" * 9000, b'{"a":' * 3000, b'"images":', b'"annotations":[', b"null", b"\xff", b"\xc3", b"\xef\xbb\xbf"]


@pytest.mark.slow
@hostile(
    "annotation text",
    data=st.one_of(
        damages.map(lambda made: damage_bytes(_TEXT.encode(), made)),
        st.tuples(st.integers(0, len(_TEXT)), st.sampled_from(_TOKENS)).map(
            lambda made: _TEXT[: made[0]].encode() + made[1] + _TEXT[made[0] :].encode()
        ),
        st.lists(st.one_of(st.sampled_from(_TOKENS), st.binary(max_size=3)), max_size=8).map(b"".join),
        changes.map(lambda made: _dumps(change_document(json.loads(_TEXT), made))),
        st.binary(max_size=50),
    ),
)
def test_hostile_text_is_read_or_refused(data):
    _read(data)


_numbers = st.one_of(st.sampled_from(NUMBERS), st.floats(width=32), st.floats(0, 24), st.floats(0, 1), st.integers())


@pytest.mark.slow
@hostile(
    "numbers",
    boxes=st.lists(st.lists(_numbers, min_size=4, max_size=4), min_size=1, max_size=4),
    polygon=st.lists(_numbers, min_size=6, max_size=10),
    of_all=st.booleans(),
)
def test_hostile_numbers_are_read_or_refused(boxes, polygon, of_all):
    document = json.loads(_TEXT)
    for i, annotation in enumerate(document["annotations"][: None if of_all else len(boxes)]):
        annotation["bbox"], annotation["segmentation"] = boxes[i % len(boxes)], [polygon]
    _read(json.dumps(document).encode())


_counts = st.one_of(
    st.text(st.characters(min_codepoint=44, max_codepoint=116), max_size=30),
    damages.map(lambda made: damage_bytes(_RLE.encode(), made).decode("latin1")),
    st.lists(st.one_of(st.integers(0, 500), st.sampled_from(NUMBERS)), max_size=8),
    st.lists(st.integers(0, 480), max_size=8).map(lambda runs: [*runs, max(0, 480 - sum(runs))]),
)
_sides = st.one_of(st.just(20), st.just(24), st.sampled_from(NUMBERS))


@pytest.mark.slow
@hostile("run lengths", counts=_counts, height=_sides, width=_sides, boxed=st.booleans())
def test_hostile_run_lengths_are_read_or_refused(counts, height, width, boxed):
    if isinstance(counts, str) and is_well_formed(counts.encode("utf-8")):
        text = counts.encode()
        total = num_pixels(np.frombuffer(text, np.uint8), np.array([0, len(text)]))[0]
        if total == 480:
            assert coco_mask.decode({"size": [20, 24], "counts": text}).shape == (20, 24)
    document = json.loads(_TEXT)
    segmentation = {"size": [height, width], "counts": counts}
    box = {"bbox": [1, 1, 9, 9]} if boxed else {}
    document["annotations"] = [{"id": 1, "image_id": 1, "category_id": 1, "segmentation": segmentation} | box] * 2
    _read(json.dumps(document).encode())


def _image_files():
    made = [cv2.imencode(end, _PIXELS[..., :3])[1].tobytes() for end in (".jpg", ".png", ".bmp", ".webp", ".tiff")]
    made += [cv2.imencode(end, _PIXELS[..., :3])[1].tobytes() for end in (".ppm", ".ras", ".pam")]
    made.append(cv2.imencode(".jp2", np.tile(_PIXELS[..., :3], (4, 4, 1)))[1].tobytes())
    made += [cv2.imencode(end, np.float32(_PIXELS[..., :3]))[1].tobytes() for end in (".hdr", ".pfm")]
    made.append(cv2.imencode(".png", _PIXELS)[1].tobytes())
    made.append(cv2.imencode(".png", np.uint16(_PIXELS) * 99)[1].tobytes())
    made.append(cv2.imencode(".png", _PIXELS[..., 0])[1].tobytes())
    return made


_FILES = _image_files()


@hostile(
    "images",
    data=st.one_of(
        st.tuples(st.sampled_from(_FILES), damages).map(lambda made: damage_bytes(*made)),
        st.tuples(st.sampled_from(_FILES), st.integers(0, 40), st.sampled_from([b"\xff", b"\x7f\xff", b"9" * 8])).map(
            lambda made: made[0][: made[1]] + made[2] + made[0][made[1] + len(made[2]) :]
        ),
        st.tuples(st.sampled_from([file[:12] for file in _FILES]), st.binary(max_size=40)).map(b"".join),
        st.tuples(*[st.tuples(st.sampled_from(_FILES), st.integers(0, 600))] * 2).map(
            lambda two: two[0][0][: two[0][1]] + two[1][0][two[1][1] :]
        ),
    ),
    channels=st.sampled_from([3, 3, 4]),
    upright=st.booleans(),
)
def test_hostile_images_are_read_or_refused(data, channels, upright):
    with contextlib.suppress(UndecodableError):
        image = decode_image(data, channels, upright=upright)
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] <= channels
    image = check_and_decode(Path("a.jpg"), data, (20, 24), channels)
    assert image.shape == (20, 24, channels)


def test_a_run_tries_ten_thousand_hostile_files():
    assert sum(CASES.values()) >= 10_000
