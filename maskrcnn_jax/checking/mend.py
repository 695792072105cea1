"""Write a cleaned copy of an annotation file. What is changed for a finding stands in the table of findings."""

import json
import os
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from pycocotools import mask as coco_mask

from maskrcnn_jax.checking.dataset import Progress, Split, check_split, no_progress, with_unlisted_files
from maskrcnn_jax.data.coco import CocoDataset
from maskrcnn_jax.data.dataset import find_alike
from maskrcnn_jax.data.entries import polygon_problem, short
from maskrcnn_jax.data.findings import ANNOTATIONS, CATEGORIES, IMAGES, Kind, Mend
from maskrcnn_jax.data.json_stream import stream_json
from maskrcnn_jax.data.numbers import number, plain
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.options import Options
from maskrcnn_jax.paths import as_path, file_names
from maskrcnn_jax.writing import replace_file

_ROUNDS = 3  # a corrected entry may turn out to have another problem

Changes = dict[str, list[str]]  # what was changed -> the images and annotations that were


def fix_dataset(
    splits: list[Split],
    output: str | os.PathLike,
    options: Options,
    *,
    open_images: bool = True,
    progress: Progress = no_progress,
) -> tuple[Split, Changes]:
    """Write a cleaned copy of the annotations of the first split, and check it.

    Args:
        splits: of the dataset, checked.
        output: the file to write.
        options: of the training that the dataset is for.
        open_images: also read the images when the copy is checked.
        progress: wraps the iteration over the images when the copy is checked.

    Returns:
        The split of the cleaned copy, and what was changed.

    Raises:
        UserError: the annotations cannot be mended, or the copy cannot be written or would overwrite annotations.
    """
    output, split = as_path(output), splits[0]
    if any(output.resolve() == s.json_path.resolve() for s in splits):
        raise UserError(f"the cleaned copy would overwrite the annotations {output}; give it another name")
    changes: Changes = {}
    for _ in range(_ROUNDS):
        for change, names in mend(split, output).items():
            changes.setdefault(change, []).extend(names)
        split = check_split(output.stem, output, split.image_dir, options, open_images=open_images, progress=progress)
        if not split.num_errors:
            break
    return with_unlisted_files([split, *splits[1:]])[0], changes


def mend(split: Split, output: Path) -> Changes:
    """Write a copy of a split's annotations, in which findings are corrected or their entries dropped.

    Args:
        split: as it was checked.
        output: the file to write.

    Returns:
        What was changed.

    Raises:
        UserError: the file cannot be read as annotations, nothing would be left, or the output cannot be written.
    """
    if split.data is None:
        raise UserError(f"{split.json_path} cannot be mended: {split.findings[-1].sentence}")
    mender = _Mender(split, split.data)
    kept: dict[str, list[str]] = {IMAGES: [], ANNOTATIONS: [], CATEGORIES: []}

    def handler(section: str, change: Callable[[int, Any], object]) -> Callable[[object], None]:
        places = iter(range(2**62))

        def handle(entry: object) -> None:
            entry = change(next(places), plain(entry))
            if entry is not None:
                kept[section].append(json.dumps(entry))

        return handle

    changes = {IMAGES: mender.image, ANNOTATIONS: mender.annotation, CATEGORIES: mender.category}
    try:
        rest = stream_json(split.json_path, {name: handler(name, change) for name, change in changes.items()})
        values = {name: json.dumps(value) for name, value in rest.items() if name not in kept}
    except RecursionError:
        raise UserError(f"{split.json_path} cannot be mended: its lists are nested too deeply") from None
    empty = [name for name, entries in kept.items() if not entries]
    if empty:
        raise UserError(f"no {' and no '.join(empty)} of {split.json_path} would be left; correct them by hand")
    parts = (
        f"{json.dumps(name)}: " + (f"[{', '.join(kept[name])}]" if name in kept else values[name]) for name in rest
    )
    replace_file(output, "{" + ",\n".join(parts) + "}\n")
    return mender.changes


class _Mender:
    """Changes entries one by one, in the order of the file."""

    def __init__(self, split: Split, data: CocoDataset):
        names = data.file_names.tolist()
        self.changes: Changes = {}
        # What to change where: by section and mend, the place of each entry and the kind of its finding.
        self._places: dict[tuple[str, Mend], dict[int, Kind]] = defaultdict(dict)
        for finding in split.findings:
            if finding.kind.mend:
                places = self._places[finding.section, finding.kind.mend]
                for place in finding.rows.tolist():
                    places.setdefault(place, finding.kind)
        # A few changes concern all boxes or polygons, also those that were not read.
        self._everywhere = {finding.kind.mend for finding in split.findings}
        self._sizes = dict(zip(data.image_ids.tolist(), data.sizes.tolist(), strict=True))
        self._names = dict(zip(data.image_ids.tolist(), names, strict=True))
        rows = dict(zip(data.image_places.tolist(), range(len(data.image_ids)), strict=True))
        missing = [rows[place] for place in self._places[IMAGES, Mend.FIND_FILE] if place in rows]
        present = file_names(split.image_dir)
        self._found = find_alike(present, [names[row] for row in missing])
        gone = missing + [rows[place] for place in self._places[IMAGES, Mend.DROP_IMAGE] if place in rows]
        self._gone = {int(data.image_ids[row]) for row in gone if not self._found.get(names[row])}
        first = {name: image_id for image_id, name in reversed(self._names.items())}
        self._merged = {image_id: first[name] for image_id, name in self._names.items() if first[name] != image_id}
        self._shift = data.category_shift
        self._next_id = _largest_id(split.json_path) + 1

    def image(self, place: int, entry: dict) -> dict | None:
        if self._is_dropped(IMAGES, place, entry):
            return None
        name = entry["file_name"]
        if entry["id"] in self._gone:
            kind = self._kind(IMAGES, Mend.DROP_IMAGE, place) or self._kind(IMAGES, Mend.FIND_FILE, place)
            self._note(f"{Mend.DROP_IMAGE}: {kind}", name)
            return None
        found = self._found.get(name)
        if found:
            self._note(Mend.FIND_FILE, f"{name} is {found}")
            return entry | {"file_name": found}
        return entry

    def category(self, place: int, entry: dict) -> dict | None:
        return None if self._is_dropped(CATEGORIES, place, entry) else entry

    def annotation(self, place: int, entry: dict) -> dict | None:
        if self._is_dropped(ANNOTATIONS, place, entry) or entry["image_id"] in self._gone:
            return None
        size = self._sizes.get(entry["image_id"])
        if size is None:  # its image was malformed, too
            self._note_dropped(ANNOTATIONS, Kind.UNLISTED_IMAGE, place, entry)
            return None
        entry = dict(entry)
        name = f"{self._names[entry['image_id']]}, annotation {entry['id']}"
        self._mend_ids(place, entry, name)
        self._mend_polygons(place, entry, name, size)
        if Mend.NOT_CROWD in self._everywhere:
            self._note(Mend.NOT_CROWD, name)
            entry["iscrowd"] = 0
        if not self._mend_box(place, entry, name, size):
            return None
        if self._kind(ANNOTATIONS, Mend.AREA_FROM_MASK, place):
            self._note(Mend.AREA_FROM_MASK, name)
            entry["area"] = _area(entry.get("segmentation"), entry.get("bbox"), size)
        return entry

    def _mend_ids(self, place: int, entry: dict, name: str) -> None:
        if entry["image_id"] in self._merged:
            self._note(Mend.MERGE_IMAGES, name)
            entry["image_id"] = self._merged[entry["image_id"]]
        if self._shift:
            self._note(f"{Mend.SHIFT_CATEGORY} by {self._shift:+d}", name)
            entry["category_id"] += self._shift
        # No copy keeps an id of 0, which is a problem only where the split is evaluated.
        if entry["id"] == 0 or self._kind(ANNOTATIONS, Mend.NEW_ID, place):
            self._note(Mend.NEW_ID, f"{name} is now {self._next_id}")
            entry["id"] = self._next_id
            self._next_id += 1

    def _mend_polygons(self, place: int, entry: dict, name: str, size: list[int]) -> None:
        """Correct the polygons in place."""
        polygons: Any = entry.get("segmentation")
        if self._kind(ANNOTATIONS, Mend.NEST_POLYGONS, place):
            self._note(Mend.NEST_POLYGONS, name)
            entry["segmentation"] = polygons = _flat_polygons(polygons)
        if self._kind(ANNOTATIONS, Mend.DROP_POLYGONS, place):
            self._note(Mend.DROP_POLYGONS, name)
            entry["segmentation"] = polygons = [polygon for polygon in polygons if not polygon_problem(polygon)]
        if Mend.SCALE_POLYGONS in self._everywhere and isinstance(polygons, list):
            self._note(Mend.SCALE_POLYGONS, name)
            entry["segmentation"] = [_scaled(polygon, size) for polygon in polygons]

    def _mend_box(self, place: int, entry: dict, name: str, size: list[int]) -> bool:
        """Correct the box in place; return False if the annotation is to be dropped."""
        box = entry.get("bbox")
        if box and Mend.SCALE_BOXES in self._everywhere:
            self._note(Mend.SCALE_BOXES, name)
            entry["bbox"] = box = _scaled(box, size)
        if box and Mend.CORNERS_TO_SIZES in self._everywhere:
            self._note(Mend.CORNERS_TO_SIZES, name)
            entry["bbox"] = box = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
        kind = self._kind(ANNOTATIONS, Mend.BOX_FROM_MASK, place)
        if kind:
            around = _box_around(entry.get("segmentation"), size)
            if around is None:
                self._note_dropped(ANNOTATIONS, kind, place, entry)
                return False
            self._note(Mend.BOX_FROM_MASK, name)
            entry["bbox"] = around
        elif self._kind(ANNOTATIONS, Mend.CLIP_BOX, place) and box:
            self._note(Mend.CLIP_BOX, name)
            x, y, width, height = box
            entry["bbox"] = _clipped([x, y, x + width, y + height], size)
        return True

    def _is_dropped(self, section: str, place: int, entry: object) -> bool:
        kind = self._kind(section, Mend.DROP, place) or self._kind(section, Mend.MERGE_IMAGES, place)
        if kind:
            self._note_dropped(section, kind, place, entry)
        return kind is not None

    def _kind(self, section: str, change: Mend, place: int) -> Kind | None:
        """Return the kind of the finding for which an entry is to be changed so, None if it is not."""
        return self._places[section, change].get(place)

    def _note_dropped(self, section: str, kind: Kind, place: int, entry: object) -> None:
        self._note(f"{section} {Mend.DROP}: {kind}", self._describe(section, place, entry))

    def _note(self, change: str, name: str) -> None:
        self.changes.setdefault(str(change), []).append(name)

    def _describe(self, section: str, place: int, entry: object) -> str:
        if not isinstance(entry, dict):
            return f"entry {place}"
        if section == IMAGES:
            return short(entry.get("file_name", f"entry {place}"))
        if section == CATEGORIES:
            return short(entry.get("name", f"entry {place}"))
        image_id = entry.get("image_id")
        image = self._names.get(image_id) if isinstance(image_id, int) else None
        return f"{image or 'image ' + short(image_id)}, annotation {short(entry.get('id'))}"


def _flat_polygons(polygons: list) -> list[list[float]]:
    """Nest the numbers of polygons as COCO does: lists of lists of numbers."""
    parts = [_flat(polygon) for polygon in polygons]
    return [_flat(parts)] if all(len(part) < 3 for part in parts) else parts  # numbers or points, not polygons


def _flat(numbers: object) -> list:
    return [number for part in numbers for number in _flat(part)] if isinstance(numbers, list) else [numbers]


class _WithId(msgspec.Struct):
    id: int = 0


def _largest_id(path: Path) -> int:
    """Return the largest id of an annotation, whether it can be read or not; at least 0."""
    decoder, largest = msgspec.json.Decoder(list[_WithId]), 0

    def see(entry: object) -> None:
        nonlocal largest
        value = number(entry.get("id")) if isinstance(entry, dict) else None
        largest = max(largest, value) if isinstance(value, int) else largest

    def see_batch(text: bytes) -> bool:
        nonlocal largest
        try:
            largest = max([largest, *(entry.id for entry in decoder.decode(text))])
        except (ValueError, RecursionError):
            return False
        return True

    stream_json(path, {ANNOTATIONS: see}, {ANNOTATIONS: see_batch}, skip=[IMAGES])
    return largest


def _scaled(numbers: list[float], size: list[int]) -> list[float]:
    height, width = size
    return [value * (height if i % 2 else width) for i, value in enumerate(numbers)]


def _clipped(corners: list[float], size: list[int]) -> list[float] | None:
    height, width = size
    x1, y1, x2, y2 = np.clip(corners, 0, [width, height, width, height]).tolist()
    return [x1, y1, x2 - x1, y2 - y1] if x2 > x1 and y2 > y1 else None


def _area(segmentation: dict | list | None, box: list[float] | None, size: list[int]) -> float:
    """Return the area of a mask in pixels, or of the box where there is no mask."""
    if segmentation:
        packed = isinstance(segmentation, dict) and isinstance(segmentation["counts"], str)
        rle = segmentation if packed else coco_mask.frPyObjects(segmentation, *size)
        return float(coco_mask.area(coco_mask.merge(rle) if isinstance(rle, list) else rle))
    return box[2] * box[3] if box else 0.0


def _box_around(segmentation: dict | list | None, size: list[int]) -> list[float] | None:
    if not segmentation:
        return None
    if isinstance(segmentation, dict):
        rle = segmentation
        if isinstance(rle["counts"], list):
            rle = coco_mask.frPyObjects(rle, *size)
        x, y, width, height = coco_mask.toBbox(rle).tolist()
        return _clipped([x, y, x + width, y + height], size)
    points = np.array([number for polygon in segmentation for number in polygon], np.float64).reshape(-1, 2)
    if not len(points):
        return None
    return _clipped([*points.min(axis=0), *points.max(axis=0)], size)
