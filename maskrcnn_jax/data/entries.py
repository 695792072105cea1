"""Decodes the entries of an annotation file into flat arrays, in the order of the file.

msgspec decodes the entries in batches, so that COCO's training annotations take seconds and less than a gigabyte.
Entries that msgspec refuses, such as those with the NaN that Python writes, are read by the slower ``json``; what
other tools write in place of numbers is then converted (``numbers``).
"""

import itertools
import math
import re
import struct
from array import array
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Generic, TypeAlias, TypeVar

import msgspec
import numpy as np
from pycocotools import mask as coco_mask

from maskrcnn_jax.data.findings import Finding, Kind, Report
from maskrcnn_jax.data.json_stream import stream_json
from maskrcnn_jax.data.numbers import number, plain
from maskrcnn_jax.data.run_lengths import is_well_formed
from maskrcnn_jax.errors import UserError

_FARTHEST = 1e5  # pixels; coordinates beyond are mistakes
_LONGEST_OUTLINE = 1e6  # pixels of a polygon; drawing takes some 80 bytes for each
_MOST_PIXELS = 1 << 30  # of an image; OpenCV decodes no larger one
NO_NAME = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # breaks lines, or no file or UTF-8 has it
_LONGEST_NAME = 1024  # characters; all names together lie in one array, at the width of the longest
_NO_BOX = (math.nan,) * 4

_Id = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]


class _Image(msgspec.Struct, gc=False):
    """An entry of "images"."""

    id: _Id
    height: int
    width: int
    file_name: str

    def __post_init__(self):
        if self.height < 1 or self.width < 1 or self.height * self.width > _MOST_PIXELS:
            raise ValueError(
                f"size {self.height}x{self.width} (height x width), where 1 to {_MOST_PIXELS:,} pixels can be decoded"
            )
        if not 0 < len(self.file_name) <= _LONGEST_NAME or NO_NAME.search(self.file_name):
            raise ValueError(f"file_name {short(self.file_name)}")


class RunLengths(msgspec.Struct, gc=False):
    """A run-length mask, whose ``counts`` are compressed as soon as they are read."""

    size: tuple[int, int]  # height, width
    counts: str | list[int]

    def __post_init__(self):
        height, width = self.size
        if height < 1 or width < 1 or height * width > _MOST_PIXELS:  # pycocotools divides by the height
            raise ValueError(f"the size of its mask is {short(height)}x{short(width)}")
        packed = None
        if isinstance(self.counts, str):
            packed = self.counts.encode("ascii")
        elif all(0 <= count <= _MOST_PIXELS for count in self.counts):
            packed = coco_mask.frPyObjects({"size": [height, width], "counts": self.counts}, height, width)["counts"]
        if packed is None or not is_well_formed(packed):
            raise ValueError("the counts of its mask are no run lengths")
        self.counts = packed  # type: ignore[assignment]  # msgspec would decode the annotation bytes as base64


_Mask: TypeAlias = list[list[float]] | RunLengths | None


class _Annotation(msgspec.Struct, gc=False):
    """An entry of "annotations"."""

    id: _Id
    image_id: _Id
    category_id: _Id
    iscrowd: bool | int | float | None = 0
    bbox: tuple[float, float, float, float] | None = None
    area: object = None
    segmentation: _Mask = None


_Entry = TypeVar("_Entry", _Image, _Annotation)


def read_sections(path: Path, images: "Images", annotations: "Annotations") -> object:
    """Collect the entries of a file and return its categories."""
    handlers = {"images": images.add, "annotations": annotations.add}
    rest = stream_json(path, handlers, {"images": images.extend, "annotations": annotations.extend})
    absent = [name for name in ("images", "annotations", "categories") if name not in rest]
    if absent:
        raise UserError(
            f"{path} has no {' and no '.join(absent)}; a COCO instances file has lists of images, annotations and "
            'categories, these such as {"id": 1, "name": "person"}'
        )
    return rest["categories"]


class _Section(Generic[_Entry]):
    """The entries of one list of the file, collected in flat arrays."""

    malformed: Kind
    type: type[_Entry]

    def __init__(self, path: Path, report: Report):
        self.path, self.report = path, report
        self.decoder = msgspec.json.Decoder(list[self.type])  # type: ignore[name-defined]
        self.num_seen = 0
        self.places, self.ids = array("q"), array("q")

    def extend(self, text: bytes) -> bool:
        """Collect the entries of a JSON list, unless msgspec refuses one; return whether they were collected."""
        try:
            entries = self.decode(text)
            self.check(entries)
        except (ValueError, RecursionError):  # msgspec's errors are ValueErrors, too
            return False
        self.pack(range(self.num_seen, self.num_seen + len(entries)), entries)
        self.num_seen += len(entries)
        return True

    def decode(self, text: bytes) -> Sequence[_Entry]:
        """Decode a JSON list; several times as slow where numbers have another form than COCO's."""
        try:
            return self.decoder.decode(text)
        except ValueError:
            return [self.convert(entry) for entry in msgspec.json.decode(text)]

    def add(self, entry: object) -> None:
        """Collect an entry that ``json`` has decoded, or report that it is malformed."""
        place = self.num_seen
        self.num_seen += 1
        try:
            converted = self.convert(entry)
            self.check([converted])
        except ValueError as error:
            self.report(malformed(self.path, self.malformed, place, entry, error))
        else:
            self.pack([place], [converted])

    def convert(self, entry: object) -> _Entry:
        try:
            return msgspec.convert(entry, self.type)
        except ValueError:
            return msgspec.convert(plain(entry), self.type)

    def check(self, entries: Sequence[_Entry]) -> None:
        """Raise ValueError where values are wrong though their types are right."""

    def pack(self, places: Sequence[int], entries: Sequence[_Entry]) -> None:
        """Append well-formed entries to the arrays."""
        _extend(self.places, places)
        _extend(self.ids, [entry.id for entry in entries])


class Images(_Section[_Image]):
    malformed, type = Kind.MALFORMED_IMAGE, _Image

    def __init__(self, path: Path, report: Report):
        super().__init__(path, report)
        self.sizes = array("i")
        self.file_names: list[str] = []

    def pack(self, places: Sequence[int], entries: Sequence[_Image]) -> None:
        super().pack(places, entries)
        _extend(self.sizes, [side for entry in entries for side in (entry.height, entry.width)])
        self.file_names.extend([entry.file_name for entry in entries])


class Annotations(_Section[_Annotation]):
    """The annotations; num_parts is -1 without a usable mask, numbers of boxes and areas NaN where there are none.

    Areas that are no numbers are infinite, for ``areas`` to find.
    """

    malformed, type = Kind.MALFORMED_ANNOTATION, _Annotation

    def __init__(self, path: Path, report: Report):
        super().__init__(path, report)
        self.problems: dict[Kind, array] = defaultdict(lambda: array("q"))
        self.image_ids, self.category_ids = array("q"), array("q")
        self.iscrowd, self.boxes, self.areas = array("b"), array("d"), array("d")
        self.num_parts, self.coordinates, self.part_lengths = array("i"), array("d"), array("q")
        self.rle_counts, self.rle_offsets, self.rle_sizes = bytearray(), array("q", [0]), array("q")

    def convert(self, entry: object) -> _Annotation:
        if isinstance(entry, dict):  # empty lists, objects and text, which tools write where there is none
            entry = entry | {name: None for name in ("bbox", "segmentation") if not entry.get(name, True)}
        try:
            return super().convert(entry)
        except ValueError:
            if isinstance(entry, dict) and _is_nested_wrongly(entry.get("segmentation")):
                self.check([super().convert(entry | {"segmentation": None})])  # raises if more is wrong
                raise _NestingError from None
            raise

    def check(self, entries: Sequence[_Annotation]) -> None:
        wrong = {entry.iscrowd for entry in entries} - {0, 1, None}
        if wrong:
            raise ValueError(f"iscrowd is {wrong.pop()}, neither 0 nor 1")
        masks = [entry.segmentation for entry in entries]
        if any(map(_are_pairs, [mask for mask in masks if type(mask) is list and len(mask) > 2])):
            raise _NestingError

    def pack(self, places: Sequence[int], entries: Sequence[_Annotation]) -> None:
        masks = [entry.segmentation for entry in entries]
        start = len(self.coordinates)
        lengths = _extend_by_polygons(self.coordinates, masks)
        if not _are_drawable(self.coordinates, start, lengths):
            masks = [self._drop_polygons(place, mask) for place, mask in zip(places, masks, strict=True)]
            del self.coordinates[start:]
            lengths = _extend_by_polygons(self.coordinates, masks)
        super().pack(places, entries)
        _extend(self.image_ids, [entry.image_id for entry in entries])
        _extend(self.category_ids, [entry.category_id for entry in entries])
        _extend(self.iscrowd, [bool(entry.iscrowd) for entry in entries])
        _extend(self.boxes, list(itertools.chain.from_iterable([entry.bbox or _NO_BOX for entry in entries])))
        areas = [entry.area for entry in entries]
        _extend(self.areas, [area if type(area) is float and area == area else _area(area) for area in areas])
        _extend(self.num_parts, [-1 if not mask else len(mask) if type(mask) is list else 0 for mask in masks])
        _extend(self.part_lengths, lengths)
        for mask in [mask for mask in masks if type(mask) is RunLengths]:
            self.rle_sizes.extend(mask.size)
            self.rle_counts += mask.counts  # type: ignore[arg-type]  # bytes, see RunLengths
            self.rle_offsets.append(len(self.rle_counts))

    def _drop_polygons(self, place: int, mask: _Mask) -> _Mask:
        """Return a mask without the polygons that cannot be drawn."""
        if type(mask) is not list:
            return mask
        kinds = [polygon_problem(polygon) for polygon in mask]
        for kind in filter(None, kinds):
            self.problems[kind].append(place)
        return [polygon for polygon, kind in zip(mask, kinds, strict=True) if kind is None]

    def columns(self) -> dict[str, np.ndarray]:
        """Return the columns of CocoDataset that the file gives directly, in the order of the file."""
        num_parts = to_numpy(self.num_parts, np.int32)
        num_polygons, is_rle = np.maximum(num_parts, 0), num_parts == 0
        return {
            "places": to_numpy(self.places, np.int64),
            "annotation_ids": to_numpy(self.ids, np.int64),
            "category_ids": to_numpy(self.category_ids, np.int64),
            "file_boxes": to_numpy(self.boxes, np.float64).reshape(-1, 4),
            "areas": to_numpy(self.areas, np.float64),
            "iscrowd": to_numpy(self.iscrowd, np.int8) != 0,
            "first_part": np.where(is_rle, np.cumsum(is_rle) - 1, np.cumsum(num_polygons) - num_polygons),
            "num_parts": num_parts,
        }

    def masks(self) -> dict[str, np.ndarray]:
        """Return the arrays of CocoDataset that hold the masks."""
        return {
            "coordinates": to_numpy(self.coordinates, np.float64),
            "part_offsets": np.concatenate([[0], np.cumsum(to_numpy(self.part_lengths, np.int64))]),
            "rle_counts": np.frombuffer(bytes(self.rle_counts), np.uint8),
            "rle_offsets": to_numpy(self.rle_offsets, np.int64),
        }


def polygon_problem(polygon: list[float]) -> Kind | None:
    """Return the kind of problem for which a polygon is dropped, or None."""
    if len(polygon) < 6 or len(polygon) % 2:
        return Kind.SHORT_POLYGON
    # Drawing takes memory in proportion to the outline, so wild numbers could take all there is.
    reach = max(map(abs, polygon))
    if not reach <= _FARTHEST or not math.isfinite(sum(polygon)):
        return Kind.FAR_POLYGON
    if reach * len(polygon) > _LONGEST_OUTLINE and _outline(polygon) > _LONGEST_OUTLINE:  # the first takes no time
        return Kind.FAR_POLYGON
    return None


def _outline(polygon: list[float]) -> float:
    """Return the length of an outline, by the longer side of each step."""
    xy = np.array(polygon, np.float64).reshape(-1, 2)
    return float(np.abs(xy - np.roll(xy, 1, axis=0)).max(axis=1).sum())


def _extend_by_polygons(coordinates: array, masks: Sequence[object]) -> list[int]:
    """Append the numbers of all polygons, end to end, and return how many each has."""
    polygons = [polygon for mask in masks if type(mask) is list for polygon in mask]
    flat: list[float] = []
    for polygon in polygons:
        flat += polygon  # several times as fast as itertools.chain
    _extend(coordinates, flat)
    return list(map(len, polygons))


def _are_drawable(coordinates: array, start: int, lengths: list[int]) -> bool:
    """Whether none of many polygons has a problem, told without a look at each; False if one may have.

    Args:
        coordinates: ends with the numbers of these polygons.
        start: where they begin.
        lengths: how many numbers each polygon has.
    """
    if not lengths:
        return True
    if any(length < 6 or length % 2 for length in set(lengths)):
        return False
    numbers = to_numpy(coordinates, np.float64)[start:]
    reach = max(numbers.max(), -numbers.min())
    return bool(reach <= _FARTHEST and reach * max(lengths) <= _LONGEST_OUTLINE)


def _is_nested_wrongly(segmentation: object) -> bool:
    """Whether the numbers of a polygon lie one list too deep, or one too high."""
    return isinstance(segmentation, list) and any(
        (polygon and isinstance(polygon[0], list)) if isinstance(polygon, list) else not isinstance(polygon, dict)
        for polygon in segmentation
    )


def _are_pairs(polygons: list[list[float]]) -> bool:
    """Whether these are the points of one polygon, three or more, each a list of its own."""
    return all(len(polygon) == 2 for polygon in polygons)


class _NestingError(ValueError):
    """A segmentation with polygons that are nested wrongly."""


def _area(value: object) -> float:
    """Return an area that is no usual float: NaN for none, infinity for what is no number."""
    if value is None:
        return math.nan
    value = number(value)
    try:
        return float(value) if isinstance(value, int | float) and value == value else math.inf
    except OverflowError:
        return math.inf


def malformed(path: Path, kind: Kind, place: int, entry: object, error: Exception) -> Finding:
    """Make the finding of an entry that is malformed."""
    name = short(entry.get("id", f"at place {place}, without an id,") if isinstance(entry, dict) else entry)
    if isinstance(error, _NestingError):
        return Kind.NESTING.finding([place], name=name, path=path)
    return kind.finding([place], name=name, path=path, reason=" ".join(str(error).split())[:200])


def short(value: object) -> str:
    """Name an unexpected value, however long or deep, in at most 60 printable characters."""
    if isinstance(value, list | dict):
        return f"a {type(value).__name__} of {len(value)}"
    text = " ".join(str(value).split())[:60]
    return text.encode(errors="backslashreplace").decode()  # half of a surrogate pair cannot be printed


def _extend(packed: array, numbers: Sequence[float]) -> None:
    """Append to packed numbers, in a third of the time that ``array.extend`` takes."""
    packed.frombytes(struct.pack(f"{len(numbers)}{packed.typecode}", *numbers))


def to_numpy(packed: array, dtype: type) -> np.ndarray:
    """View packed numbers as NumPy, without a copy."""
    return np.frombuffer(packed, dtype) if packed else np.zeros(0, dtype)
