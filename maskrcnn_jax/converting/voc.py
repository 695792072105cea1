"""Reads Pascal VOC's layout: XML with boxes and names, and instance masks in SegmentationObject.

An instance of a mask gets the name of the object in the XML whose box fits it best. Without XML, its name is that of
its colour in SegmentationClass. Objects without an instance in the mask have a box only.
"""

import logging
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np

from maskrcnn_jax.converting.label_map import Region, read_label_map, regions
from maskrcnn_jax.converting.source import Object, Picture, Source, image_form, read_text
from maskrcnn_jax.data.images import IMAGE_SUFFIXES
from maskrcnn_jax.data.layouts import entries_of, image_files
from maskrcnn_jax.data.orientation import turn_back, upright_size
from maskrcnn_jax.errors import UserError

_log = logging.getLogger(__name__)

_NAMES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog"),
    *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
_LABEL_MAP, _CLASS_NAMES = "labelmap.txt", "class_names.txt"  # of CVAT and of labelme's converter to VOC
_MOST_BYTES = 1 << 24  # of an XML file
_FITS = 0.4  # intersection over union of a mask's box and that of its object in the XML
_INSIDE = 0.8  # of a mask's box, where it is part of an object that another one covers
_FARTHEST = 1e6  # pixels


class _Named(NamedTuple):
    """An object of an XML file."""

    name: str
    corners: tuple[float, float, float, float]  # as in the file


class _Annotated(NamedTuple):
    """An XML file."""

    path: Path
    size: tuple[int, int] | None  # height, width, where the file says it
    things: list[_Named]


def _voc_colour(index: int) -> int:
    """Return the colour that VOC draws an index in, as ``read_label_map`` gives colours."""
    red, green, blue = (sum((index >> (3 * bit + i) & 1) << (7 - bit) for bit in range(3)) for i in range(3))
    return red << 32 | green << 16 | blue


_VOID = _voc_colour(255)  # of borders between objects


def read_voc(root: Path) -> Source:
    """Open a dataset in VOC's layout.

    Args:
        root: folder with JPEGImages, and Annotations, SegmentationObject or both; an absolute path.

    Raises:
        UserError: there are no images or names, or a file is malformed.
    """
    images = {path.stem: path for path in image_files(root / "JPEGImages")}
    if not images:
        raise UserError(f"{root} has no images in JPEGImages/; add them, as Pascal VOC has them")
    masks = {path.stem: path for path in image_files(root / "SegmentationObject")}
    files = {path.stem: path for path in entries_of(root / "Annotations") if path.suffix == ".xml"}
    annotated = {stem: _read_xml(path) for stem, path in files.items() if stem in images}
    colours = _class_colours(root)
    things = [thing for file in annotated.values() for thing in file.things]
    found = {thing.name for thing in things}
    has_list = (root / _LABEL_MAP).is_file() or (root / _CLASS_NAMES).is_file()
    # Of VOC's own names only those that occur, but all that a file lists.
    names = [name for name in colours.values() if not found or name in found or has_list]
    names += sorted(found.difference(names))
    if not names:
        raise UserError(f"{root} names no objects; add XML files to Annotations/, or {_LABEL_MAP}")
    ids = {name: i for i, name in enumerate(names, start=1)}
    # VOC counts pixels from 1, most tools that write its format from 0.
    one = 0 if any(min(thing.corners) < 1 for thing in things) else 1
    reader = _Reader(root, images, masks, annotated, ids, colours, one)
    splits = _splits(root, images, sorted(images.keys() & (masks.keys() or files.keys())))
    return Source({i: name for name, i in ids.items()}, {name: partial(reader.read, s) for name, s in splits.items()})


def _splits(root: Path, images: Collection[str], stems: list[str]) -> dict[str, list[str]]:
    """Return the names of the images of each split, by ImageSets if there are some."""
    lists = [path for path in entries_of(root / "ImageSets" / "Segmentation") if path.suffix == ".txt"]
    lists = lists or [path for path in entries_of(root / "ImageSets" / "Main") if path.suffix == ".txt"]
    lists = [path for path in lists if "_" not in path.stem]  # Main has a list of each class
    if {"train", "val"} <= {path.stem for path in lists}:
        lists = [path for path in lists if path.stem != "trainval"]
    splits = {
        path.stem: [_listed(line, images) for line in read_text(path).splitlines() if line.strip()] for path in lists
    }
    splits = {name: sorted(set(listed)) for name, listed in splits.items() if listed}
    if not splits and not stems:
        raise UserError(f"{root} has no annotated images; JPEGImages/ and Annotations/ must have the same names")
    return splits or {"train": stems}


def _listed(line: str, images: Collection[str]) -> str:
    """Return the name in a line of a list: the whole line, which CVAT quotes if it has spaces, or its first word."""
    whole = line.strip().strip('"')
    return whole if _stem(whole) in images else line.split()[0]


def _stem(name: str) -> str:
    """Return the name of an image without folders and suffix, which some tools write in lists."""
    return Path(name).stem if Path(name).suffix in IMAGE_SUFFIXES else name


@dataclass(frozen=True)
class _Reader:
    """Yields the images of a split."""

    root: Path
    images: dict[str, Path]
    masks: dict[str, Path]
    annotated: dict[str, _Annotated]
    ids: dict[str, int]
    colours: dict[int, str]
    one: int

    def read(self, stems: list[str]) -> Iterator[Picture]:
        unsure = 0
        for stem in stems:
            image = self.images.get(_stem(stem))
            if image is None:
                raise UserError(f"ImageSets/ in {self.root} lists {stem[:60]!r}, which is not in JPEGImages/; add it")
            size, orientation = image_form(image)
            file = self.annotated.get(image.stem)
            unsure += orientation != 1 and file is not None and file.size in (None, size)
            yield Picture(image, image.name, size, list(self._objects(image.stem, size, orientation)))

        if unsure:
            _log.warning(
                "%d images have an EXIF orientation; their boxes are taken as those of the stored pixels, because the "
                "XML does not state the size of a turned image",
                unsure,
            )

    def _objects(self, stem: str, size: tuple[int, int], orientation: int) -> Iterator[Object]:
        mask, file = self.masks.get(stem), self.annotated.get(stem)
        things = file.things if file else []
        if file and things and file.size not in (None, size, size[::-1]):
            raise UserError(
                f"{file.path} is for an image of {file.size[0]}x{file.size[1]} pixels (height x width), but "
                f"{self.images[stem]} has {size[0]}x{size[1]}; find the image that was annotated"
            )
        # Some tools exchange height and width without any orientation.
        is_turned = file and file.size and file.size != size and upright_size(size, orientation) == file.size
        orientation = orientation if is_turned else 1
        boxes = [self._box(thing, size, orientation) for thing in things]
        if mask:
            labels = read_label_map(mask, size)
            if labels.max() < 256:  # indices of a palette; the last is the border between objects
                labels[labels == 255] = 0
            labels[labels == _VOID] = 0
            found = regions(labels, mask)
            pairs = _fitting([region.box for region in found], boxes)
            for place, region in enumerate(found):
                name = things[pairs[place]].name if place in pairs else self._name_by_class(stem, region, labels)
                yield region.to_object(self.ids[name])
            left = set(range(len(things))).difference(pairs.values())
        else:
            left = set(range(len(things)))
        for place in sorted(left):
            box = boxes[place]
            yield Object(self.ids[things[place].name], None, box, box[2] * box[3])

    def _box(self, thing: _Named, size: tuple[int, int], orientation: int) -> list[float]:
        x1, y1, x2, y2 = thing.corners
        x1, y1 = x1 - self.one, y1 - self.one
        if orientation != 1:
            corners = turn_back(np.array([[x1, y1], [x2, y2]]), size, orientation)
            (x1, y1), (x2, y2) = np.sort(corners, axis=0).tolist()
        return [x1, y1, x2 - x1, y2 - y1]

    def _name_by_class(self, stem: str, region: Region, labels: np.ndarray) -> str:
        """Return the name of an instance by the colour that it has in SegmentationClass."""
        path = self.root / "SegmentationClass" / f"{stem}.png"
        if path.is_file():
            classes = read_label_map(path, (labels.shape[0], labels.shape[1]), palette=True)
            colours, counts = np.unique(classes[labels == region.value], return_counts=True)
            colour = int(colours[counts.argmax()])
            name = self.colours.get(colour, self.colours.get(_voc_colour(colour)) if colour < 256 else None)
            if name in self.ids:
                return name
        raise UserError(
            f"{self.masks[stem]} has an object with the box {[round(v) for v in region.box]} (x, y, width, height) "
            f"that no object in Annotations/{stem}.xml fits and whose colour in SegmentationClass/ has no name; add "
            f"it to the XML, or its colour to {_LABEL_MAP}"
        )


def _fitting(boxes: list[list[float]], others: list[list[float]]) -> dict[int, int]:
    """Pair boxes x, y, width, height one to one, those that overlap most first."""
    if not boxes or not others:
        return {}
    a, b = np.array(boxes)[:, None], np.array(others)[None]
    low, high = np.maximum(a[..., :2], b[..., :2]), np.minimum(a[..., :2] + a[..., 2:], b[..., :2] + b[..., 2:])
    common = np.maximum(high - low, 0).prod(axis=-1)
    overlaps = common / np.maximum(a[..., 2:].prod(axis=-1) + b[..., 2:].prod(axis=-1) - common, 1e-9)
    # A mask that another object covers in part lies inside the box of its own.
    fits = (overlaps >= _FITS) | (common >= _INSIDE * a[..., 2:].prod(axis=-1)) & (common > 0)
    pairs: dict[int, int] = {}
    for flat in np.argsort(-overlaps, axis=None, kind="stable").tolist():
        row, column = divmod(flat, len(others))
        if fits[row, column] and row not in pairs and column not in pairs.values():
            pairs[row] = column
    return pairs


def _class_colours(root: Path) -> dict[int, str]:
    """Return the name of each colour in SegmentationClass: of CVAT's or labelme's list of them, else VOC's."""
    path, listed = root / _LABEL_MAP, root / _CLASS_NAMES
    if listed.is_file():
        names = [line.strip() for line in read_text(listed).splitlines()]
        return {_voc_colour(index): name for index, name in enumerate(names) if index and name}
    if not path.is_file():
        is_voc = (root / "SegmentationClass").is_dir()
        return {_voc_colour(index): name for index, name in enumerate(_NAMES, start=1)} if is_voc else {}
    colours = {}
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if line.strip() and not line.startswith("#"):
            match = re.fullmatch(r"(.+?):(\d{1,3}),(\d{1,3}),(\d{1,3})(:.*)?", line.strip())
            if not match:
                raise UserError(f"{path}, line {number}, is {line[:60]!r}; write name:red,green,blue::")
            colours[int(match[2]) << 32 | int(match[3]) << 16 | int(match[4])] = match[1]
    return {colour: name for colour, name in colours.items() if colour and name != "background"}


def _read_xml(path: Path) -> _Annotated:
    text = read_text(path, _MOST_BYTES)
    if "<!DOCTYPE" in text or "<!ENTITY" in text:  # by which a few bytes become gigabytes
        raise UserError(f"{path} defines entities, which VOC's XML does not; remove the DOCTYPE")
    try:
        tree = ElementTree.fromstring(re.sub(r"^\s*<\?xml[^>]*\?>", "", text))
    except (ElementTree.ParseError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid XML ({' '.join(str(error).split())[:100]}); write it again") from None
    if tree.tag != "annotation":
        raise UserError(f"{path} holds <{tree.tag[:40]}>, but VOC's XML holds <annotation>; remove or convert it")
    try:
        size = int(tree.findtext("size/height") or 0), int(tree.findtext("size/width") or 0)
    except ValueError:
        size = 0, 0
    return _Annotated(
        path, size if min(size) > 0 else None, [_read_object(element, path) for element in tree.iterfind("object")]
    )


def _read_object(element: ElementTree.Element, path: Path) -> _Named:
    name = (element.findtext("name") or "").strip()
    try:
        corners = [float(element.findtext(f"bndbox/{tag}") or "") for tag in ("xmin", "ymin", "xmax", "ymax")]
    except ValueError:
        corners = []
    if not name or len(corners) < 4 or not all(abs(value) < _FARTHEST for value in corners):
        raise UserError(
            f"{path} has an object {name[:40]!r} without a name, or without xmin, ymin, xmax and ymax in its bndbox; "
            "correct or remove it"
        )
    x1, y1, x2, y2 = corners
    return _Named(name, (x1, y1, x2, y2))
