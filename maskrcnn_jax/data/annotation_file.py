"""Packs the JSON of a COCO-format dataset into flat arrays, in the order of the file, and checks that it is whole."""

import array
import itertools
import math
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pycocotools import mask as coco_mask

from maskrcnn_jax.data.findings import Finding, Kind, Report, stop
from maskrcnn_jax.data.json_stream import stream_json
from maskrcnn_jax.data.run_lengths import is_well_formed, num_pixels
from maskrcnn_jax.errors import UserError

_FARTHEST = 1e5  # pixels; coordinates beyond are mistakes
_LONGEST_OUTLINE = 1e6  # pixels of a polygon; drawing takes some 80 bytes for each
_MOST_PIXELS = 1 << 30  # of an image; OpenCV decodes no larger one
_NO_NAME = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # breaks lines, or no file or UTF-8 has it
_LONGEST_NAME = 1024  # characters; all names together lie in one array, at the width of the longest


@dataclass(frozen=True, eq=False)
class AnnotationFile:
    """N images, K annotations with a box or a mask, C categories; the rows refer to one another by position."""

    path: Path
    num_annotations: int  # in the file, unusable ones included
    problems: dict[str, np.ndarray]  # kind of problem -> places in the file's annotations
    category_ids: list[int]
    category_names: list[str]
    category_shift: int  # what the category ids of the annotations needed; 0 unless they were off by one
    image_places: np.ndarray  # [N] int64, places in the file's images
    image_ids: np.ndarray  # [N] int64
    sizes: np.ndarray  # [N, 2] int32 (height, width)
    file_names: list[str]
    places: np.ndarray  # [K] int64, places in the file's annotations
    annotation_ids: np.ndarray  # [K] int64
    image_rows: np.ndarray  # [K] int64, row of the image
    category_rows: np.ndarray  # [K] int64, position of the category, -1 for one that is not listed
    boxes: np.ndarray  # [K, 4] float32 x, y, width, height as in the file
    crowd: np.ndarray  # [K] bool
    first_part: np.ndarray  # [K] int64, first polygon, or the row of the run-length mask
    num_parts: np.ndarray  # [K] int32, 0 for a run-length mask, -1 for none
    coordinates: np.ndarray  # float64
    part_offsets: np.ndarray  # [P + 1] int64
    rle_counts: np.ndarray  # uint8
    rle_offsets: np.ndarray  # [R + 1] int64


def read_annotation_file(path: Path, *, keep_unlisted: bool = False, report: Report = stop) -> AnnotationFile:
    """Reads an annotation file. Where an annotation has a mask only, its box is the one around the mask.

    Args:
        path: the JSON.
        keep_unlisted: accept annotations of categories that the file does not list.
        report: called with what is wrong: a malformed entry, ids given twice, annotations that refer to an image or a
            category which the file does not have. If it returns, reading goes on without these entries.

    Raises:
        UserError: broken JSON, a missing or empty section; and what ``report`` raises.
    """
    images, annotations = _Images(path, report), _Annotations(path, report)
    rest = stream_json(path, {"images": images.add, "annotations": annotations.add})
    absent = [name for name in ("images", "annotations", "categories") if name not in rest]
    if absent:
        raise UserError(
            f"{path} has no {' and no '.join(absent)}; a COCO instances file has lists of images, annotations and "
            'categories, these such as {"id": 1, "name": "person"}'
        )
    category_ids, category_names = _categories(path, rest["categories"], report)
    if not images.file_names:
        raise UserError(f"{path} lists no images; at least one is needed")
    first = _first_of_each(path, images, report)
    image_ids = _numpy(images.ids, np.int64)[first]
    sizes = _numpy(images.sizes, np.int32).reshape(-1, 2)[first]
    file_names = [images.file_names[i] for i in first]
    image_rows = _positions(image_ids, annotations.image_ids)
    _report_unlisted(path, annotations, "image", image_rows, report)
    shift = 0 if keep_unlisted else _check_shift(path, annotations, category_ids, report)
    category_rows = _positions(np.array(category_ids) - shift, annotations.category_ids)
    if not keep_unlisted:
        _report_unlisted(path, annotations, "category", category_rows, report)
    places = _numpy(annotations.places, np.int64)
    problems = {kind: _numpy(rows, np.int64) for kind, rows in annotations.problems.items()}
    usable, other_size = _run_lengths_that_fit(path, annotations, file_names, sizes, image_rows, report)
    usable &= (category_rows >= 0) | keep_unlisted
    if keep_unlisted:
        problems[Kind.IGNORED] = places[category_rows < 0]
    problems[Kind.OTHER_SIZE] = places[other_size]
    boxes = _numpy(annotations.boxes, np.float32).reshape(-1, 4)
    usable &= np.isfinite(boxes).all(axis=1)
    return AnnotationFile(
        path=path,
        num_annotations=annotations.num_seen,
        problems={kind: rows for kind, rows in problems.items() if len(rows)},
        category_ids=category_ids,
        category_names=category_names,
        category_shift=shift,
        image_places=_numpy(images.places, np.int64)[first],
        image_ids=image_ids,
        sizes=sizes,
        file_names=file_names,
        places=places[usable],
        annotation_ids=_numpy(annotations.ids, np.int64)[usable],
        image_rows=image_rows[usable],
        category_rows=category_rows[usable],
        boxes=boxes[usable],
        crowd=_numpy(annotations.crowd, np.int8)[usable] != 0,
        first_part=_numpy(annotations.first_part, np.int64)[usable],
        num_parts=_numpy(annotations.num_parts, np.int32)[usable],
        coordinates=_numpy(annotations.coordinates, np.float64),
        part_offsets=_numpy(annotations.part_offsets, np.int64),
        rle_counts=np.frombuffer(bytes(annotations.rle_counts), np.uint8),
        rle_offsets=_numpy(annotations.rle_offsets, np.int64),
    )


def mask_rle(annotations: AnnotationFile, row: int, height: int, width: int) -> dict:
    """Returns the mask of an annotation as pycocotools' run lengths, polygons rasterised.

    Args:
        annotations: the file, or an index with the same arrays.
        row: of an annotation with a mask.
        height: of the canvas in pixels; of the image, where the file has run lengths already.
        width: likewise.
    """
    first, num = annotations.first_part[row], annotations.num_parts[row]
    if num == 0:
        counts = annotations.rle_counts[annotations.rle_offsets[first] : annotations.rle_offsets[first + 1]]
        return {"size": [height, width], "counts": counts.tobytes()}
    bounds = annotations.part_offsets[first : first + num + 1]
    polygons = [annotations.coordinates[start:stop] for start, stop in itertools.pairwise(bounds)]
    parts = coco_mask.frPyObjects(polygons, height, width)
    return coco_mask.merge(parts) if num > 1 else parts[0]


class _Images:
    """Collects the entries of "images"."""

    def __init__(self, path: Path, report: Report):
        self.path, self.report = path, report
        self.num_seen = 0
        self.places, self.ids, self.sizes, self.file_names = array.array("q"), array.array("q"), array.array("i"), []

    def add(self, entry: dict) -> None:
        place = self.num_seen
        self.num_seen += 1
        try:
            height, width, name = entry["height"], entry["width"], entry["file_name"]
            self.ids.append(entry["id"])
            self.sizes.extend((height, width))
            if height < 1 or width < 1 or height * width > _MOST_PIXELS:
                raise ValueError(f"size {height}x{width}")
            if not isinstance(name, str) or not 0 < len(name) <= _LONGEST_NAME or _NO_NAME.search(name):
                raise ValueError(f"file_name {short(name)}")
        except (KeyError, TypeError, ValueError, OverflowError) as e:
            del self.ids[len(self.file_names) :], self.sizes[2 * len(self.file_names) :]
            self.report(_malformed(self.path, Kind.MALFORMED_IMAGE, place, entry, e))
            return
        self.places.append(place)
        self.file_names.append(name)


class _Annotations:
    """Collects the entries of "annotations"; num_parts is -1 without a usable mask, the box NaN without one either."""

    def __init__(self, path: Path, report: Report):
        self.path, self.report = path, report
        self.problems: dict[str, array.array] = defaultdict(lambda: array.array("q"))
        self.num_seen = 0
        self.places = array.array("q")
        self.ids, self.image_ids, self.category_ids = array.array("q"), array.array("q"), array.array("q")
        self.boxes, self.crowd = array.array("f"), array.array("b")
        self.first_part, self.num_parts = array.array("q"), array.array("i")
        self.coordinates, self.part_offsets = array.array("d"), array.array("q", [0])
        self.rle_counts, self.rle_offsets, self.rle_sizes = bytearray(), array.array("q", [0]), array.array("q")

    def add(self, entry: dict) -> None:
        place, ends = self.num_seen, (len(self.part_offsets), len(self.rle_offsets))
        self.num_seen += 1
        try:
            self.ids.append(entry["id"])
            self.image_ids.append(entry["image_id"])
            self.category_ids.append(entry["category_id"])
            crowd = entry.get("iscrowd", 0)
            if crowd not in (0, 1, None):
                raise ValueError(f"iscrowd is {short(crowd)}, neither 0 nor 1")
            self.crowd.append(bool(crowd))
            segmentation = entry.get("segmentation")
            if isinstance(segmentation, dict):
                self._add_rle(segmentation)
            else:
                self._add_polygons(segmentation, place)
            x, y, width, height = entry.get("bbox") or self._box_around_last()
            self.boxes.extend((x, y, width, height))
        except _NestingError:
            self._forget(*ends)
            self.report(Kind.NESTING.finding([place], name=_name(entry, place), path=self.path))
            return
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as e:
            self._forget(*ends)
            self.report(_malformed(self.path, Kind.MALFORMED_ANNOTATION, place, entry, e))
            return
        self.places.append(place)
        if self.num_parts[-1] < 0:
            self.problems[Kind.ONLY_BOX if entry.get("bbox") else Kind.NO_BOX_NOR_MASK].append(place)
        if entry.get("bbox") and not all(map(math.isfinite, self.boxes[-4:])):
            self.problems[Kind.NOT_FINITE].append(place)

    def _forget(self, num_offsets: int, num_rle_offsets: int) -> None:
        """Takes back what an entry that turned out to be malformed has left."""
        num = len(self.places)
        for packed in (self.ids, self.image_ids, self.category_ids, self.crowd, self.first_part, self.num_parts):
            del packed[num:]
        del self.boxes[4 * num :]
        del self.part_offsets[num_offsets:], self.rle_offsets[num_rle_offsets:]
        del self.coordinates[self.part_offsets[-1] :], self.rle_counts[self.rle_offsets[-1] :]
        del self.rle_sizes[2 * (num_rle_offsets - 1) :]

    def _add_polygons(self, polygons: list[list[float]] | None, place: int) -> None:
        self.first_part.append(len(self.part_offsets) - 1)
        if not isinstance(polygons, list | None):
            raise ValueError(f"segmentation is {short(polygons)}, neither polygons nor run lengths")
        num = 0
        for polygon in polygons or ():
            if not isinstance(polygon, list) or (polygon and isinstance(polygon[0], list)):
                raise _NestingError
            problem = polygon_problem(polygon)
            if problem:
                self.problems[problem].append(place)
                continue
            self.coordinates.extend(polygon)
            self.part_offsets.append(len(self.coordinates))
            num += 1
        self.num_parts.append(num or -1)

    def _add_rle(self, rle: dict) -> None:
        height, width = rle["size"]
        counts = rle["counts"]
        self.rle_sizes.extend((height, width))
        if height < 1 or width < 1 or height * width > _MOST_PIXELS:  # pycocotools divides by the height
            raise ValueError(f"the size of its mask is {short(height)}x{short(width)}")
        if isinstance(counts, list):
            if not all(0 <= count <= _MOST_PIXELS for count in counts):
                raise ValueError("the counts of its mask are no run lengths")
            counts = coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)["counts"]
        else:
            counts = counts.encode("ascii")
        if not is_well_formed(counts):
            raise ValueError("the counts of its mask are no run lengths")
        self.first_part.append(len(self.rle_offsets) - 1)
        self.num_parts.append(0)
        self.rle_counts += counts
        self.rle_offsets.append(len(self.rle_counts))

    def _box_around_last(self) -> tuple[float, ...]:
        """Returns the box x, y, width, height around the mask that was added last."""
        first, num = self.first_part[-1], self.num_parts[-1]
        if num < 0:
            return (math.nan,) * 4
        if num == 0:
            rle = {"size": list(self.rle_sizes[-2:]), "counts": bytes(self.rle_counts[self.rle_offsets[first] :])}
            return tuple(coco_mask.toBbox(rle).tolist())
        xy = self.coordinates[self.part_offsets[first] :]
        x, y = xy[::2], xy[1::2]
        return min(x), min(y), max(x) - min(x), max(y) - min(y)


def polygon_problem(polygon: list[float]) -> str | None:
    """Returns the kind of problem for which a polygon is dropped, None for none."""
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
    """Returns the length of an outline, by the longer side of each step."""
    xy = np.array(polygon, np.float64).reshape(-1, 2)
    return float(np.abs(xy - np.roll(xy, 1, axis=0)).max(axis=1).sum())


class _NestingError(ValueError):
    """The numbers of a polygon lie one list too deep, or one too high."""


def _categories(path: Path, entries: list[dict], report: Report) -> tuple[list[int], list[str]]:
    names, twice = {}, {}
    if not isinstance(entries, list):
        entries = []

    def malformed(reason: str) -> None:
        report(_malformed(path, Kind.MALFORMED_CATEGORY, place, entry, ValueError(reason)))

    for place, entry in enumerate(entries):
        known = isinstance(entry, dict)
        if not known or not isinstance(entry.get("id"), int) or not isinstance(entry.get("name"), str | int | float):
            malformed("id and name are needed")
        elif _NO_NAME.search(str(entry["name"])):
            malformed(f"its name is {short(entry['name'])}")
        elif not -(2**63) <= entry["id"] < 2**63:
            malformed("its id is too large")
        elif entry["id"] in names:
            twice[place] = entry["id"]
        else:
            names[entry["id"]] = str(entry["name"])
    if twice:
        report(_twice(path, Kind.CATEGORY_IDS_TWICE, twice))
    if not names:
        raise UserError(f"{path} lists no categories; at least one is needed")
    return list(names), list(names.values())


def _malformed(path: Path, kind: Kind, place: int, entry: object, error: Exception) -> Finding:
    reason = f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())[:200]
    return kind.finding([place], name=_name(entry, place), path=path, reason=reason)


def _name(entry: object, place: int) -> str:
    return short(entry.get("id", f"at place {place}, without an id,") if isinstance(entry, dict) else entry)


def short(value: object) -> str:
    """Names a value that came instead of another one; it may be as long and as deep as somebody made it."""
    if isinstance(value, list | dict):
        return f"a {type(value).__name__} of {len(value)}"
    text = " ".join(str(value).split())[:60]
    return text.encode(errors="backslashreplace").decode()  # half of a surrogate pair cannot be printed


def _numpy(packed: array.array, dtype: type) -> np.ndarray:
    """Views packed numbers as numpy, without a copy."""
    return np.frombuffer(packed, dtype) if packed else np.zeros(0, dtype)


def _first_of_each(path: Path, images: _Images, report: Report) -> np.ndarray:
    """Returns the rows of the images without those whose id came before."""
    ids, first = np.unique(_numpy(images.ids, np.int64), return_index=True)
    if len(ids) < len(images.ids):
        later = np.setdiff1d(np.arange(len(images.ids)), first)
        twice = {images.places[i]: images.ids[i] for i in later.tolist()}
        report(_twice(path, Kind.IMAGE_IDS_TWICE, twice))
    return np.sort(first)


def _twice(path: Path, kind: Kind, ids: dict[int, int]) -> Finding:
    """Makes the finding of ids by the place where each is given again."""
    return kind.finding(list(ids), path=path, ids=", ".join(map(str, sorted(set(ids.values()))[:3])))


def _positions(known: np.ndarray, wanted: array.array) -> np.ndarray:
    """Returns the position in ``known`` of each id that the annotations refer to, -1 where it is not there."""
    wanted = _numpy(wanted, np.int64)
    order = np.argsort(known)
    rows = order[np.searchsorted(known, wanted, sorter=order).clip(max=len(known) - 1)]
    return np.where(known[rows] == wanted, rows, -1)


def _report_unlisted(path: Path, annotations: _Annotations, what: str, rows: np.ndarray, report: Report) -> None:
    wrong = np.flatnonzero(rows < 0)
    if not len(wrong):
        return
    kind, ids = Kind.UNLISTED_IMAGE, annotations.image_ids
    if what == "category":
        kind, ids = Kind.UNLISTED_CATEGORY, annotations.category_ids
    first, places = wrong[0], _numpy(annotations.places, np.int64)[wrong]
    report(kind.finding(places, path=path, annotation=annotations.ids[first], id=ids[first]))


def _check_shift(path: Path, annotations: _Annotations, listed: list[int], report: Report) -> int:
    """Returns what turns the ids of the annotations into all those that are listed: 1 or -1, or 0 for neither."""
    used = np.unique(_numpy(annotations.category_ids, np.int64))
    for step in (1, -1):
        # Of all of them: one wild id must not move the others.
        if np.array_equal(used + step, np.sort(listed)):
            places = _numpy(annotations.places, np.int64)
            bounds = {"used": f"{used[0]}..{used[-1]}", "listed": f"{min(listed)}..{max(listed)}"}
            report(Kind.OFF_BY_ONE.finding(places, path=path, **bounds))
            return step
    return 0


def _run_lengths_that_fit(
    path: Path, annotations: _Annotations, file_names: list[str], sizes: np.ndarray, image_rows: np.ndarray, report
) -> tuple[np.ndarray, np.ndarray]:
    """Returns which annotations have no run-length mask or one that fills its image, and which one of another size."""
    fits, other_size = image_rows >= 0, np.zeros(len(image_rows), bool)
    rows = np.flatnonzero(fits & (_numpy(annotations.num_parts, np.int32) == 0))
    masks = _numpy(annotations.first_part, np.int64)[rows]
    image_sizes = sizes[image_rows[rows]].astype(np.int64)
    other_size[rows] = (_numpy(annotations.rle_sizes, np.int64).reshape(-1, 2)[masks] != image_sizes).any(axis=1)
    filled = num_pixels(np.frombuffer(annotations.rle_counts, np.uint8), _numpy(annotations.rle_offsets, np.int64))
    short = (filled[masks] != image_sizes.prod(axis=1)) & ~other_size[rows]
    for row in rows[short].tolist():
        image = image_rows[row]
        details = {"image": file_names[image], "size": "x".join(map(str, sizes[image]))}
        report(Kind.UNFILLED.finding([annotations.places[row]], annotation=annotations.ids[row], **details))
        fits[row] = False
    return fits & ~other_size, other_size
