"""Packs the JSON of a COCO-format dataset into flat arrays, in the order of the file, and checks that it is whole."""

import array
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pycocotools import mask as coco_mask

from maskrcnn_jax.data.json_stream import stream_json
from maskrcnn_jax.errors import UserError

_FARTHEST = 1e5  # pixels; coordinates beyond are mistakes


@dataclass(frozen=True, eq=False)
class AnnotationFile:
    """N images, K annotations with a box or a mask, C categories; the rows refer to one another by position."""

    path: Path
    num_annotations: int  # in the file, unusable ones included
    problems: dict[str, int]
    category_ids: list[int]
    category_names: list[str]
    image_ids: np.ndarray  # [N] int64
    sizes: np.ndarray  # [N, 2] int32 (height, width)
    file_names: list[str]
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


def read_annotation_file(path: Path, *, keep_unlisted: bool = False) -> AnnotationFile:
    """Reads an annotation file. Where an annotation has a mask only, its box is the one around the mask.

    Args:
        path: the JSON.
        keep_unlisted: accept annotations of categories that the file does not list.

    Raises:
        UserError: broken JSON, a missing section, a malformed entry, ids given twice, or annotations that refer to an
            image or a category which the file does not have.
    """
    images, annotations = _Images(path), _Annotations(path)
    rest = stream_json(path, {"images": images.add, "annotations": annotations.add})
    absent = [name for name in ("images", "annotations", "categories") if name not in rest]
    if absent:
        raise UserError(f"{path} has no {' and no '.join(absent)}; a COCO instances file was wanted")
    category_ids, category_names = _categories(path, rest["categories"])
    image_ids = _numpy(images.ids, np.int64)
    if not len(image_ids):
        raise UserError(f"{path} lists no images; at least one is needed")
    _refuse_twice(path, image_ids, "image")
    _refuse_twice(path, np.array(category_ids), "category")
    sizes = _numpy(images.sizes, np.int32).reshape(-1, 2)
    image_rows = _positions(image_ids, annotations.image_ids)
    _refuse_unlisted(path, annotations, annotations.image_ids, image_rows, "image", "add the image or remove them")
    category_rows = _positions(np.array(category_ids), annotations.category_ids)
    if not keep_unlisted:
        remedy = "add the category, remove them, or have them ignored by --config.data.ignore_regions=true"
        _refuse_unlisted(path, annotations, annotations.category_ids, category_rows, "category", remedy)
    usable = ~np.isnan(_numpy(annotations.boxes, np.float32).reshape(-1, 4)).any(axis=1)
    rle_rows = np.flatnonzero(_numpy(annotations.num_parts, np.int32) == 0)
    rle_sizes = _numpy(annotations.rle_sizes, np.int64).reshape(-1, 2)
    mismatched = (rle_sizes != sizes[image_rows[rle_rows]]).any(axis=1)
    usable[rle_rows[mismatched]] = False
    problems = dict(annotations.problems)
    if (category_rows < 0).any():
        problems["objects of categories that are not listed, ignored"] = int((category_rows < 0).sum())
    if mismatched.any():
        problems["run-length masks of another size than their image dropped"] = int(mismatched.sum())
    return AnnotationFile(
        path=path,
        num_annotations=len(usable),
        problems=problems,
        category_ids=category_ids,
        category_names=category_names,
        image_ids=image_ids,
        sizes=sizes,
        file_names=images.file_names,
        annotation_ids=_numpy(annotations.ids, np.int64)[usable],
        image_rows=image_rows[usable],
        category_rows=category_rows[usable],
        boxes=_numpy(annotations.boxes, np.float32).reshape(-1, 4)[usable],
        crowd=_numpy(annotations.crowd, np.int8)[usable] != 0,
        first_part=_numpy(annotations.first_part, np.int64)[usable],
        num_parts=_numpy(annotations.num_parts, np.int32)[usable],
        coordinates=_numpy(annotations.coordinates, np.float64),
        part_offsets=_numpy(annotations.part_offsets, np.int64),
        rle_counts=np.frombuffer(bytes(annotations.rle_counts), np.uint8),
        rle_offsets=_numpy(annotations.rle_offsets, np.int64),
    )


class _Images:
    """Collects the entries of "images"."""

    def __init__(self, path: Path):
        self.path = path
        self.ids, self.sizes, self.file_names = array.array("q"), array.array("i"), []

    def add(self, entry: dict) -> None:
        try:
            height, width, name = entry["height"], entry["width"], entry["file_name"]
            self.ids.append(entry["id"])
            self.sizes.extend((height, width))
        except (KeyError, TypeError, OverflowError) as e:
            raise _malformed(self.path, "image", entry, e) from None
        if height < 1 or width < 1 or not isinstance(name, str):
            raise _malformed(self.path, "image", entry, f"size {height}x{width}, file_name {name!r}")
        self.file_names.append(name)


class _Annotations:
    """Collects the entries of "annotations"; num_parts is -1 without a usable mask, the box NaN without one either."""

    def __init__(self, path: Path):
        self.path = path
        self.problems: Counter[str] = Counter()
        self.ids, self.image_ids, self.category_ids = array.array("q"), array.array("q"), array.array("q")
        self.boxes, self.crowd = array.array("f"), array.array("b")
        self.first_part, self.num_parts = array.array("q"), array.array("i")
        self.coordinates, self.part_offsets = array.array("d"), array.array("q", [0])
        self.rle_counts, self.rle_offsets, self.rle_sizes = bytearray(), array.array("q", [0]), array.array("q")

    def add(self, entry: dict) -> None:
        try:
            self.ids.append(entry["id"])
            self.image_ids.append(entry["image_id"])
            self.category_ids.append(entry["category_id"])
            self.crowd.append(bool(entry.get("iscrowd", 0)))
            segmentation = entry.get("segmentation")
            if isinstance(segmentation, dict):
                self._add_rle(segmentation)
            else:
                self._add_polygons(segmentation)
            x, y, width, height = entry.get("bbox") or self._box_around_last()
            self.boxes.extend((x, y, width, height))
            if self.num_parts[-1] < 0:
                learnt = "of which only the box is learnt" if entry.get("bbox") else "and without a box dropped"
                self.problems[f"annotations without a usable mask, {learnt}"] += 1
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as e:
            raise _malformed(self.path, "annotation", entry, e) from None

    def _add_polygons(self, polygons: list[list[float]] | None) -> None:
        self.first_part.append(len(self.part_offsets) - 1)
        num = 0
        for polygon in polygons or ():
            if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
                self.problems["polygons without three points dropped"] += 1
                continue
            # Drawing takes memory in proportion to the outline, so one wild number could take all there is.
            in_reach = max(map(abs, polygon)) <= _FARTHEST
            if not in_reach or not math.isfinite(sum(polygon)):
                self.problems["polygons with coordinates that no image has dropped"] += 1
                continue
            self.coordinates.extend(polygon)
            self.part_offsets.append(len(self.coordinates))
            num += 1
        self.num_parts.append(num or -1)

    def _add_rle(self, rle: dict) -> None:
        height, width = rle["size"]
        counts = rle["counts"]
        if isinstance(counts, list):
            counts = coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)["counts"]
        else:
            counts = counts.encode("ascii")
        self.first_part.append(len(self.rle_offsets) - 1)
        self.num_parts.append(0)
        self.rle_counts += counts
        self.rle_offsets.append(len(self.rle_counts))
        self.rle_sizes.extend((height, width))

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


def _categories(path: Path, entries: list[dict]) -> tuple[list[int], list[str]]:
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path} lists no categories; at least one is needed")
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("id"), int) or "name" not in entry:
            raise _malformed(path, "category", entry, "id and name are needed")
    return [entry["id"] for entry in entries], [str(entry["name"]) for entry in entries]


def _malformed(path: Path, kind: str, entry: object, reason: object) -> UserError:
    name = entry.get("id", "without an id") if isinstance(entry, dict) else repr(entry)[:40]
    reason = f"{reason} is missing" if isinstance(reason, KeyError) else reason
    return UserError(f"{kind} {name} in {path} is malformed: {reason}; correct or remove that entry")


def _numpy(packed: array.array, dtype: type) -> np.ndarray:
    """Views packed numbers as numpy, without a copy."""
    return np.frombuffer(packed, dtype) if packed else np.zeros(0, dtype)


def _refuse_twice(path: Path, ids: np.ndarray, kind: str) -> None:
    unique, counts = np.unique(ids, return_counts=True)
    if len(unique) < len(ids):
        twice = ", ".join(map(str, unique[counts > 1][:3]))
        raise UserError(
            f"{path} gives {kind} ids more than once, such as {twice}; every {kind} needs an id of its own"
        )


def _positions(known: np.ndarray, wanted: array.array) -> np.ndarray:
    """Returns the position in ``known`` of each id that the annotations refer to, -1 where it is not there."""
    wanted = _numpy(wanted, np.int64)
    order = np.argsort(known)
    rows = order[np.searchsorted(known, wanted, sorter=order).clip(max=len(known) - 1)]
    return np.where(known[rows] == wanted, rows, -1)


def _refuse_unlisted(path: Path, annotations: _Annotations, ids: array.array, rows, kind: str, remedy: str) -> None:
    wrong = np.flatnonzero(rows < 0)
    if len(wrong):
        first = wrong[0]
        raise UserError(
            f"{len(wrong)} annotations in {path} name a {kind} that is not listed, such as annotation "
            f"{annotations.ids[first]} with {kind} {ids[first]}; {remedy}"
        )
