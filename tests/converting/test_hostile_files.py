"""Whatever lies in a file of another format: it is converted, or refused in a sentence."""

import base64
import copy
import io
import itertools
import json
import random
import tempfile
from pathlib import Path

import cv2
import numpy as np
import yaml
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask

from maskrcnn_jax.converting.label_map import read_label_map, regions
from maskrcnn_jax.converting.labelme import read_labelme
from maskrcnn_jax.converting.voc import read_voc
from maskrcnn_jax.converting.yolo import read_yolo
from maskrcnn_jax.data.layouts import find_layout
from tests.hostile import NUMBERS, TEXTS, VALUES, change_document, damage_bytes, hostile

# Hypothesis takes ten times as long to draw a case of many values as to draw one number for all of them.
cases = st.integers(0, 1 << 48).map(random.Random)
_WORDS = (
    *map(str, NUMBERS),
    *TEXTS,
    "1",
    "0.5",
    "0.25",
    "１",
    "²",
    "1_0",
    "0x1",
    "1e5",
    "1,2",
    "\t",
    "-1",
    "--1",
    "+.5",
)
_BYTES = (
    b"\0",
    b"\xff",
    b"\xff\xff\xff\xff",
    b"\x7f\xff\xff\xff",
    b"\0\0\0\0",
    b"\n",
    b" ",
    b"<",
    b"{",
    b"]",
    b":",
    b"&",
)
_HELD = tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
_FOLDER = Path(_HELD.name)
_SIZE = 20, 24
_LABELS = np.kron(np.array([[0, 1], [2, 255]], np.uint8), np.ones((10, 12), np.uint8))


def _words(rng, most):
    return [rng.choice(_WORDS) for _ in range(rng.randint(0, most))]


def _changed(rng, document):
    """Returns a copy of a document with one to three changes."""
    deeds = ("set", "set", "set", "delete", "twice", "wrap")
    changes = [(rng.randrange(1 << 16), rng.choice(deeds), rng.choice(VALUES)) for _ in range(rng.randint(1, 3))]
    return change_document(copy.deepcopy(document), changes)


def _damaged(rng, data, most=3):
    """Returns bytes with up to so many damages."""
    deeds = ("write", "write", "write", "insert", "cut", "remove", "repeat")
    places = [rng.randrange(1 << 16) for _ in range(rng.randint(0, most))]
    written = [rng.choice((*_BYTES, rng.randbytes(rng.randint(1, 4)))) for _ in places]
    return damage_bytes(data, [(place, rng.choice(deeds), text) for place, text in zip(places, written, strict=True)])


def _folder(name, *folders):
    for folder in folders:
        (_FOLDER / name / folder).mkdir(parents=True)
    return _FOLDER / name


def _png(array, **options):
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, **({"format": "PNG"} | options))
    return stream.getvalue()


def _read(source):
    """Reads all of a dataset, whose objects must be what an annotation can hold."""
    for read in source.splits.values():
        for picture in read():
            assert picture.path.is_relative_to(_FOLDER) and ".." not in Path(picture.name).parts
            for item in picture.objects:
                assert item.category in source.categories
                numbers = [*item.box, item.area]
                if isinstance(item.segmentation, list):
                    numbers += itertools.chain(*item.segmentation)
                elif item.segmentation:
                    rle = item.segmentation | {"counts": item.segmentation["counts"].encode()}
                    assert tuple(rle["size"]) == picture.size and coco_mask.area(rle) == item.area
                assert np.isfinite(numbers).all()
                json.dumps(item.segmentation)


_YOLO = _folder("yolo", "images/train", "labels/train")
_LABEL = _YOLO / "labels" / "train" / "1.txt"
_YAML = _YOLO / "data.yaml"
_ROW = "0 0.1 0.1 0.9 0.15 0.5 0.8"
_DOCUMENT = {"path": ".", "train": "images/train", "val": ["images/train"], "nc": 2, "names": ["cat", "dog"]}
(_YOLO / "images" / "train" / "1.png").write_bytes(_png(np.zeros(_SIZE, np.uint8)))


@hostile("yolo labels", rng=cases)
def test_yolos_labels_are_read_or_refused(rng):
    _YAML.write_text("train: images/train\nnames: [cat, dog]\n")
    rows = [" ".join(["1", *_words(rng, 9)]) for _ in range(rng.randint(0, 3))]
    _LABEL.write_bytes(_damaged(rng, "\n".join([_ROW, *rows]).encode(errors="replace")))
    _read(read_yolo(_YOLO))


@hostile("yolo yaml", rng=cases)
def test_yolos_yaml_is_read_or_refused(rng):
    _LABEL.write_text(_ROW)
    try:
        text = yaml.safe_dump(_changed(rng, _DOCUMENT), allow_unicode=True)
    except yaml.YAMLError:
        text = "names: &a [*a, cat]\ntrain: images/train\n"
    _YAML.write_bytes(_damaged(rng, text.encode(errors="replace")))
    _read(read_yolo(_YOLO))


_LABELME = _folder("labelme", ".")
_JSON = _LABELME / "1.json"
(_LABELME / "1.png").write_bytes(_png(np.zeros(_SIZE, np.uint8)))
_MASK = base64.b64encode(_png(_LABELS[:5, :6] + 1)).decode()
_SHAPES = {
    "shapes": [
        {"label": "cat", "points": [[1, 1], [9, 1], [5, 9]], "shape_type": "polygon", "group_id": 1},
        {"label": "cat", "points": [[11, 1], [19, 1], [15, 9]], "group_id": 1},
        {"label": "dog", "points": [[1, 1], [9, 9]], "shape_type": "rectangle", "group_id": None},
        {"label": "dog", "points": [[9, 9], [9, 12]], "shape_type": "circle"},
        {"label": "dog", "points": [[3, 4], [8, 8]], "shape_type": "mask", "mask": _MASK},
        {"label": "dog", "points": [[3, 4]], "shape_type": "point"},
    ],
    "imagePath": "1.png",
    "imageHeight": 20,
    "imageWidth": 24,
}


@hostile("labelme", rng=cases)
def test_labelmes_json_is_read_or_refused(rng):
    _JSON.write_bytes(_damaged(rng, json.dumps(_changed(rng, _SHAPES)).encode(), most=rng.choice((0, 0, 3))))
    _read(read_labelme(_LABELME))


_VOC = _folder("voc", "JPEGImages", "Annotations", "SegmentationObject")
_XML = _VOC / "Annotations" / "1.xml"
_TEXT = "<annotation><filename>1.png</filename>{}</annotation>"
_OBJECT = (
    "<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"
)
_TWO = _TEXT.format(_OBJECT.format("cat", 13, 1, 24, 10) + _OBJECT.format("dog", 1, 11, 12, 20))
(_VOC / "JPEGImages" / "1.png").write_bytes(_png(np.zeros(_SIZE, np.uint8)))
(_VOC / "SegmentationObject" / "1.png").write_bytes(_png(_LABELS))
_ENTITIES = "".join(f'<!ENTITY a{i} "{f"&a{i - 1};" * 10 if i else "ha"}">' for i in range(9))
_BOMB = f'<?xml version="1.0"?><!DOCTYPE a [{_ENTITIES}]><annotation>&a8;</annotation>'
_DEEP = "<object>" * 5000 + "</object>" * 5000


@hostile("voc xml", rng=cases)
def test_vocs_xml_is_read_or_refused(rng):
    _XML.write_bytes(_damaged(rng, rng.choice([_TWO, _TWO, _TWO, _TWO, _BOMB, _DEEP]).encode()))
    _read(read_voc(_VOC))


@hostile("voc trees", rng=cases)
def test_vocs_objects_are_read_or_refused(rng):
    words = [word.replace("<", "").replace("&", "") for word in _words(rng, 20)]
    objects = "".join(_OBJECT.format(*words[i : i + 5]) for i in range(0, len(words) - 4, 5))
    _XML.write_bytes(_TEXT.format(_OBJECT.format("cat", 13, 1, 24, 10) + objects).encode(errors="replace"))
    _read(read_voc(_VOC))


def _deep(suffix):
    return cv2.imencode(suffix, _COLOURS.astype(np.uint16) * 257)[1].tobytes()


_MAP = _FOLDER / "map.png"
_COLOURS = np.stack([_LABELS, _LABELS * 7, _LABELS * 5], axis=2)
_MAPS = [_png(_LABELS), _png(_LABELS.astype(np.uint16) * 257), _png(_COLOURS), _png(_LABELS, format="TIFF")]
_MAPS += [_png(_LABELS.astype(np.int32), format="TIFF"), _png(_LABELS.astype(np.float32), format="TIFF")]
_MAPS += [_png(np.dstack([_COLOURS, _LABELS])), _deep(".png"), _deep(".tif")]


@hostile("label maps", rng=cases)
def test_instance_masks_are_read_or_refused(rng):
    _MAP.write_bytes(_damaged(rng, rng.choice(_MAPS)))
    labels = read_label_map(_MAP, _SIZE, palette=rng.random() < 0.5)
    found = regions(labels, _MAP)
    assert sum(region.area for region in found) == (labels != 0).sum()


_NAMES = (
    "_annotations.coco.json",
    "annotations.json",
    "a.json",
    "data.yaml",
    "1.png",
    "1_masks.png",
    "1.txt",
    "a.xml",
)
_FOLDERS = ("", "annotations", "images", "labels", "masks", "train", "train/images", "JPEGImages", "Annotations")
_CONTENTS = (b"", b"{}", b'{"images": [], "annotations": []}', b'{"shapes": [], "imagePath": ""}', b"names: [a]\n")
_CONTENTS += (b'{"images": [{"file_name": "\\ud800"}], "annotations": []}', b'{"images": [{"file_name": "\\u00')
_CONTENTS += (b'{"images": [{"file_name": "../1.png"}], "annotations": []}', b'{"file_name": "' + b"a/" * 400)


@hostile("layouts", rng=cases)
def test_a_layout_is_found_or_not(rng):
    with tempfile.TemporaryDirectory(dir=_FOLDER) as folder:
        for _ in range(rng.randint(0, 5)):
            path = Path(folder) / rng.choice(_FOLDERS) / rng.choice(_NAMES)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(_damaged(rng, rng.choice(_CONTENTS)))
        layout = find_layout(Path(folder))
        assert layout is None or all(path.is_relative_to(folder) for pair in layout.splits.values() for path in pair)
