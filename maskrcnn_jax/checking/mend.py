"""Write a cleaned copy of an annotation file: what the checker found is dropped or mended, all else stays."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from pycocotools import mask as coco_mask

from maskrcnn_jax.checking import annotations as check_annotations
from maskrcnn_jax.checking import dataset as check_dataset
from maskrcnn_jax.checking import images as check_images
from maskrcnn_jax.checking.dataset import Split
from maskrcnn_jax.data import faults
from maskrcnn_jax.data.annotation_file import polygon_problem, short
from maskrcnn_jax.data.coco import find_alike
from maskrcnn_jax.data.json_stream import stream_json
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.writing import replace_file

_DROPPED_ENTRIES = {
    "images": (faults.MALFORMED_IMAGE, faults.IMAGE_IDS_TWICE, check_annotations.SAME_FILE),
    "annotations": (
        faults.MALFORMED_ANNOTATION,
        faults.UNLISTED_IMAGE,
        faults.UNLISTED_CATEGORY,
        faults.UNFILLED,
        faults.NO_BOX_NOR_MASK,
        faults.OTHER_SIZE,
        check_annotations.SAME_ANNOTATION,
        check_annotations.EMPTY_MASK,
    ),
    "categories": (faults.MALFORMED_CATEGORY, faults.CATEGORY_IDS_TWICE),
}
# Images that go with their annotations.
_DROPPED_IMAGES = (check_images.BROKEN, faults.MISSING_FILE, check_dataset.LEAK)


def mend(split: Split, output: Path) -> dict[str, list[str]]:
    """Write the cleaned copy.

    Args:
      split: as it was checked.
      output: the file to write.

    Returns:
      What was done -> the images and annotations to which.

    Raises:
      UserError: the file cannot be read as annotations, nothing would be left, or the output cannot be written.
    """
    if split.data is None:
        raise UserError(f"{split.json_path} cannot be mended: {split.findings[-1].sentence}")
    mender = _Mender(split)
    kept: dict[str, list[str]] = {"images": [], "annotations": [], "categories": []}

    def handler(section: str, change: Callable[[int, object], object]) -> Callable[[object], None]:
        places = iter(range(2**62))

        def handle(entry: object) -> None:
            entry = change(next(places), entry)
            if entry is not None:
                kept[section].append(json.dumps(entry))

        return handle

    changes = {"images": mender.image, "annotations": mender.annotation, "categories": mender.category}
    try:
        rest = stream_json(split.json_path, {name: handler(name, change) for name, change in changes.items()})
        values = {name: json.dumps(value) for name, value in rest.items() if name not in kept}
    except RecursionError:
        raise UserError(f"{split.json_path} cannot be mended: lists in it lie too deep inside one another") from None
    empty = [name for name, entries in kept.items() if not entries]
    if empty:
        raise UserError(f"no {' and no '.join(empty)} of {split.json_path} would be left; correct them by hand")
    parts = (
        f"{json.dumps(name)}: " + (f"[{', '.join(kept[name])}]" if name in kept else values[name]) for name in rest
    )
    replace_file(output, "{" + ",\n".join(parts) + "}\n")
    return mender.done


class _Mender:
    """Changes entries one by one, in the order of the file."""

    def __init__(self, split: Split):
        file = split.data.file
        self.done: dict[str, list[str]] = {}
        self._rows = {finding.kind: set(finding.rows.tolist()) for finding in split.findings}
        self._sizes = dict(zip(file.image_ids.tolist(), file.sizes.tolist(), strict=True))
        self._names = dict(zip(file.image_ids.tolist(), file.file_names, strict=True))
        places = dict(zip(file.image_places.tolist(), range(len(file.image_ids)), strict=True))
        missing = [places[i] for i in self._rows.get(faults.MISSING_FILE, ()) if i in places]
        present = {entry.name for entry in os.scandir(split.image_dir) if entry.is_file()}
        self._found = find_alike(present, [file.file_names[i] for i in missing])
        gone = {places[i] for kind in _DROPPED_IMAGES for i in self._rows.get(kind, ()) if i in places}
        self._gone = {int(file.image_ids[i]) for i in gone if not self._found.get(file.file_names[i])}
        first = {name: image_id for image_id, name in reversed(self._names.items())}
        self._merged = {image_id: first[name] for image_id, name in self._names.items() if first[name] != image_id}
        self._shift = file.category_shift
        new_ids = self._rows.keys() & {check_annotations.SAME_ID, check_annotations.ZERO_ID}
        self._next_id = _largest_id(split.json_path) + 1 if new_ids else 0

    def image(self, place: int, entry: dict) -> dict | None:
        if self._is_dropped("images", place, entry):
            return None
        if entry["id"] in self._gone:
            reason = next((kind for kind in _DROPPED_IMAGES if self._has(kind, place)), check_annotations.SAME_FILE)
            self._note(f"images dropped with their annotations: {reason}", entry["file_name"])
            return None
        name = self._found.get(entry["file_name"])
        if name:
            self._note("file names corrected", f"{entry['file_name']} is {name}")
            return entry | {"file_name": name}
        return entry

    def category(self, place: int, entry: dict) -> dict | None:
        return None if self._is_dropped("categories", place, entry) else entry

    def annotation(self, place: int, entry: dict) -> dict | None:
        if self._is_dropped("annotations", place, entry):
            return None
        size = self._sizes.get(entry["image_id"])
        if entry["image_id"] in self._gone:
            return None
        if size is None:  # its image, too, was malformed
            self._note(f"annotations dropped: {faults.UNLISTED_IMAGE}", self._describe("annotations", place, entry))
            return None
        entry = dict(entry)
        name = f"{self._names[entry['image_id']]}, annotation {entry['id']}"
        self._mend_ids(place, entry, name)
        self._mend_mask(place, entry, name, size)
        return entry if self._mend_box(place, entry, name, size) else None

    def _mend_ids(self, place: int, entry: dict, name: str) -> None:
        if entry["image_id"] in self._merged:
            self._note("moved to the first entry of their image", name)
            entry["image_id"] = self._merged[entry["image_id"]]
        if self._shift:
            self._note(f"category ids changed by {self._shift:+d}", name)
            entry["category_id"] += self._shift
        if self._has(check_annotations.SAME_ID, place) or self._has(check_annotations.ZERO_ID, place):
            self._note("given an id of their own", f"{name} is now {self._next_id}")
            entry["id"] = self._next_id
            self._next_id += 1

    def _mend_mask(self, place: int, entry: dict, name: str, size: list[int]) -> None:
        """Mends the mask in place."""
        polygons = entry.get("segmentation")
        if self._has(faults.NESTING, place):
            self._note("polygons nested as they should be", name)
            polygons = _flat_polygons(polygons)
            entry["segmentation"] = polygons
        if self._has(faults.SHORT_POLYGON, place) or self._has(faults.FAR_POLYGON, place):
            self._note("polygons dropped that cannot be drawn", name)
            entry["segmentation"] = polygons = [polygon for polygon in polygons if not polygon_problem(polygon)]
        if faults.NORMALISED_POLYGONS in self._rows and isinstance(polygons, list):
            self._note("polygons turned from shares into pixels", name)
            entry["segmentation"] = [_scaled(polygon, size) for polygon in polygons]

    def _mend_box(self, place: int, entry: dict, name: str, size: list[int]) -> bool:
        """Mends the box in place; returns False where the annotation is to be dropped."""
        box = entry.get("bbox")
        if box and faults.NORMALISED_BOXES in self._rows:
            self._note("boxes turned from shares into pixels", name)
            entry["bbox"] = box = _scaled(box, size)
        if box and faults.CORNERS in self._rows:
            self._note("boxes turned from corners into x, y, width, height", name)
            entry["bbox"] = box = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
        if any(self._has(kind, place) for kind in (faults.NOT_FINITE, faults.FLAT_BOX, faults.OUTSIDE_BOX)):
            around = _box_around(entry.get("segmentation"), size)
            if around is None:
                self._note("annotations dropped: neither box nor mask can be used", name)
                return False
            self._note("boxes taken from the mask", name)
            entry["bbox"] = around
        elif self._has(faults.CLIPPED_BOX, place) and box:
            self._note("boxes clipped to their image", name)
            x, y, width, height = box
            entry["bbox"] = _clipped([x, y, x + width, y + height], size)
        return True

    def _is_dropped(self, section: str, place: int, entry: object) -> bool:
        for kind in _DROPPED_ENTRIES[section]:
            if self._has(kind, place):
                self._note(f"{section} dropped: {kind}", self._describe(section, place, entry))
                return True
        return False

    def _describe(self, section: str, place: int, entry: object) -> str:
        if not isinstance(entry, dict):
            return f"entry {place}"
        if section == "images":
            return short(entry.get("file_name", f"entry {place}"))
        if section == "categories":
            return short(entry.get("name", f"entry {place}"))
        image_id = entry.get("image_id")
        image = self._names.get(image_id) if isinstance(image_id, int) else None
        return f"{image or 'image ' + short(image_id)}, annotation {short(entry.get('id'))}"

    def _has(self, kind: str, place: int) -> bool:
        return place in self._rows.get(kind, ())

    def _note(self, what: str, name: str) -> None:
        self.done.setdefault(what, []).append(name)


def _flat_polygons(polygons: list) -> list[list[float]]:
    """Nests the numbers of polygons as COCO does: lists of lists of numbers."""
    if polygons and not isinstance(polygons[0], list):
        return [polygons]
    return [_flat(polygon) for polygon in polygons]


def _flat(numbers: object) -> list:
    return [number for part in numbers for number in _flat(part)] if isinstance(numbers, list) else [numbers]


def _largest_id(path: Path) -> int:
    ids = [0]

    def see(entry: object) -> None:
        value = entry.get("id") if isinstance(entry, dict) else None
        ids[0] = max(ids[0], value) if isinstance(value, int) else ids[0]

    stream_json(path, {"annotations": see})
    return ids[0]


def _scaled(numbers: list[float], size: list[int]) -> list[float]:
    height, width = size
    return [value * (height if i % 2 else width) for i, value in enumerate(numbers)]


def _clipped(corners: list[float], size: list[int]) -> list[float] | None:
    height, width = size
    x1, y1, x2, y2 = np.clip(corners, 0, [width, height, width, height]).tolist()
    return [x1, y1, x2 - x1, y2 - y1] if x2 > x1 and y2 > y1 else None


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
