"""Reads labelme's JSON files, one an image; what also writes them are X-AnyLabeling and others.

Polygons, rectangles, circles and masks are objects. Shapes of a class with the same group_id are parts of one object.
labelme shows images upright, as their EXIF orientation says; its coordinates are turned back to the pixels as stored.
"""

import base64
import json
import logging
import math
import os
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from maskrcnn_jax.converting.label_map import read_label_map, regions
from maskrcnn_jax.converting.source import (
    Object,
    Picture,
    Source,
    image_form,
    inside,
    read_text,
    with_polygons,
)
from maskrcnn_jax.data.entries import short
from maskrcnn_jax.data.images import IMAGE_SUFFIXES
from maskrcnn_jax.data.layouts import folders_in
from maskrcnn_jax.data.orientation import turn_back, upright_size
from maskrcnn_jax.errors import UserError

_log = logging.getLogger(__name__)

_SPLITS = ("train", "training", "val", "valid", "validation", "test")
_WITHOUT_AREA = ("point", "points", "line", "linestrip")
_FARTHEST = 1e5  # pixels; the reader of annotations drops what lies farther
_CIRCLE = 128  # corners; within 0.03 % of its radius


def read_labelme(root: Path) -> Source:
    """Open a folder of JSON files, or of folders train, val and test of them.

    Args:
        root: the folder; an absolute path.

    Raises:
        UserError: a file is malformed, refers to no image in the folder, or has a shape that is none.
    """
    folders = {folder.name: folder for folder in folders_in(root) if folder.name.lower() in _SPLITS}
    found = {name: _json_files(folder) for name, folder in folders.items()}
    files = {name: paths for name, paths in found.items() if paths} or {"train": _json_files(root)}
    names: set[str] = set()
    for path in (path for paths in files.values() for path in paths):
        names |= {shape["label"] for shape in _load(path)["shapes"] if shape["shape_type"] not in _WITHOUT_AREA}
    if not names:
        raise UserError(f"the JSON files in {root} have no shapes with an area; draw polygons, rectangles or circles")
    ids = {name: i for i, name in enumerate(sorted(names), start=1)}
    folders = folders if files.keys() <= folders.keys() else {"train": root}
    splits = {name: partial(_pictures, root, folders[name], paths, ids) for name, paths in files.items()}
    return Source({i: name for name, i in ids.items()}, splits)


def _json_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.json") if not path.name.startswith("."))


def _load(path: Path) -> dict[str, Any]:
    """Return the content of a file with shapes whose labels, types and points are what they should be."""
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not valid JSON; write it again with labelme, or remove it") from None
    shapes = content.get("shapes") if isinstance(content, dict) else None
    if not isinstance(shapes, list):
        raise UserError(
            f"{path} has no list of shapes, as labelme writes it; remove it, or convert other formats separately"
        )
    for place, shape in enumerate(shapes):
        if not isinstance(shape, dict) or not isinstance(shape.get("label"), str):
            raise UserError(f"{path} has a shape without a label at place {place}; correct or remove it")
        points = shape.get("points")
        if not isinstance(points, list) or not all(_is_point(point) for point in points):
            raise UserError(
                f"{path} has a shape {shape['label'][:40]!r} at place {place} whose points are no list of x, y in "
                "pixels; correct or remove it"
            )
        shape.setdefault("shape_type", "polygon")  # labelme 3 had only these
    return content


def _is_point(point: object) -> bool:
    return (
        isinstance(point, list)
        and len(point) == 2
        and all(type(value) in (int, float) and abs(value) <= _FARTHEST for value in point)
    )


def _pictures(root: Path, folder: Path, paths: list[Path], ids: dict[str, int]) -> Iterator[Picture]:
    skipped, names = 0, set()
    for path in paths:
        content = _load(path)
        image = _image(root, path, content)
        size, orientation = image_form(image)
        upright = upright_size(size, orientation)
        given = content.get("imageHeight"), content.get("imageWidth")
        if all(given) and given != upright:
            raise UserError(
                f"{path} is for an image of {short(given[0])}x{short(given[1])} pixels (height x width), but "
                f"{image} has {upright[0]}x{upright[1]}; find the image that was annotated"
            )
        groups: dict[object, list[dict]] = defaultdict(list)
        for place, shape in enumerate(content["shapes"]):
            if shape["shape_type"] in _WITHOUT_AREA:
                skipped += 1
                continue
            group = shape.get("group_id")
            is_group = isinstance(group, int | str)
            groups[(shape["label"], str(group)) if is_group else place].append(shape)
        objects = [_object(path, shapes, ids, size, orientation) for shapes in groups.values()]
        name = image.relative_to(folder if image.is_relative_to(folder) else root).as_posix()
        if name in names:
            raise UserError(f"{path} is a second file of annotations for {image}; merge the two, or remove one")
        names.add(name)
        yield Picture(image, name, size, objects)
    if skipped:
        _log.warning("%s: %d points and lines are left out, which have no area", folder, skipped)


def _image(root: Path, path: Path, content: dict) -> Path:
    """Return the image of a file: where it says, or else beside it."""
    given = content.get("imagePath")
    if not isinstance(given, str) or not 0 < len(given) < 1024:
        raise UserError(f"{path} has no imagePath; write the name of its image there")
    given = given.replace("\\", "/")
    image = Path(os.path.abspath(path.parent / given))
    candidates = [path.parent / image.name]
    if image.is_relative_to(root):  # otherwise it is a path of another computer, or of where the JSON was before
        candidates = [image, *candidates, *(path.with_suffix(suffix) for suffix in sorted(IMAGE_SUFFIXES))]
    found = next((candidate for candidate in candidates if os.path.isfile(candidate)), None)
    if found is None:
        inside(root, image, path)
        raise UserError(f"{path} names the image {given[:100]!r}, which is not there; add it, or remove the file")
    return found


def _object(path: Path, shapes: list[dict], ids: dict[str, int], size: tuple[int, int], orientation: int) -> Object:
    """Make an object from its parts: polygons as they are, masks and parts with masks as run lengths."""
    category = ids[shapes[0]["label"]]
    polygons, masks = [], []
    for shape in shapes:
        if shape["shape_type"] == "mask":
            masks.append(_mask(path, shape, size, orientation))
        else:
            polygons.append(turn_back(_polygon(path, shape), size, orientation).ravel().tolist())
    if not masks:
        return with_polygons(category, polygons)
    parts = [*masks, *coco_mask.frPyObjects(polygons, *size)] if polygons else masks
    rle = coco_mask.merge(parts)
    text = {"size": list(size), "counts": rle["counts"].decode()}
    return Object(category, text, coco_mask.toBbox(rle).tolist(), float(coco_mask.area(rle)))


def _polygon(path: Path, shape: dict) -> np.ndarray:
    """Return the outline of a shape, [n, 2] x, y."""
    kind, points = shape["shape_type"], np.array(shape["points"], np.float64).reshape(-1, 2)
    wanted = {"polygon": "3 or more", "rectangle": "2", "circle": "2"}.get(kind if isinstance(kind, str) else "")
    if wanted is None:
        raise UserError(
            f"{path} has a shape of type {str(kind)[:40]!r}; polygon, rectangle, circle and mask are known, so "
            "draw it as one of them"
        )
    if kind == "polygon" and len(points) > 2:
        return points
    if kind == "rectangle" and len(points) in (2, 4):  # X-AnyLabeling writes all four
        (x1, y1), (x2, y2) = points.min(axis=0), points.max(axis=0)
        return np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]])
    if kind == "circle" and len(points) == 2:
        angles = np.linspace(0, 2 * math.pi, _CIRCLE, endpoint=False)
        radius = math.dist(*points)
        return points[0] + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    raise UserError(
        f"{path} has a {kind} {shape['label'][:40]!r} of {len(points)} points, but it needs {wanted}; correct or "
        "remove it"
    )


def _mask(path: Path, shape: dict, size: tuple[int, int], orientation: int) -> dict:
    """Return the run lengths of a shape of type mask: a PNG in text, placed by its first point."""
    if orientation != 1 or not isinstance(shape.get("mask"), str) or len(shape["points"]) != 2:
        raise UserError(
            f"{path} has a mask {shape['label'][:40]!r} without two points or a picture, or for an image with an EXIF "
            "orientation; draw it as a polygon"
        )
    (x1, y1), (x2, y2) = [[round(value) for value in point] for point in shape["points"]]
    height, width = size
    shape_of_mask = y2 - y1 + 1, x2 - x1 + 1
    if not (0 <= x1 <= x2 < width and 0 <= y1 <= y2 < height):
        raise UserError(f"{path} has a mask {shape['label'][:40]!r} that passes the border of the image; correct it")
    with tempfile.NamedTemporaryFile(suffix=".png") as file:
        try:
            file.write(base64.b64decode(shape["mask"], validate=True))
            file.flush()
            part = read_label_map(Path(file.name), shape_of_mask) != 0
        except ValueError:
            raise UserError(
                f"{path} has a mask {shape['label'][:40]!r} that is no PNG of {shape_of_mask[0]}x{shape_of_mask[1]} "
                "pixels (height x width), as its points say, in base64; correct or remove it"
            ) from None
    whole = np.zeros(size, np.int64)
    whole[y1 : y2 + 1, x1 : x2 + 1] = part
    if not part.any():
        raise UserError(f"{path} has a mask {shape['label'][:40]!r} without a pixel; remove it")
    rle = regions(whole, path)[0].rle
    return rle | {"counts": rle["counts"].encode()}
