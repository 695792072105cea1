"""Writes a small synthetic dataset in COCO's format, so that everything can be tried without downloading COCO.

Eight classes of shapes, textured and tilted, lie on textured backgrounds and occlude one another. Each shape is a
signed distance (negative inside, pixels): the mask holds the pixels whose centre is inside, and the same distance
gives the smooth edge of the drawing. As in COCO, there are images without objects, and crowds with run-length masks.

    python -m maskrcnn_jax.data.shapes OUTPUT_DIR --train=4000 --val=500 --size=128 --seed=0

Few classes, with ids as an annotation tool may give them, in folders that are called as most people call theirs:

    python -m maskrcnn_jax.data.shapes OUTPUT_DIR --train=60 --val=20 --categories=circle:7,star:12,heart:900 \
        --splits=train,val
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as coco_mask
from tqdm import tqdm

from maskrcnn_jax.errors import UserError
from maskrcnn_jax.paths import local_path
from maskrcnn_jax.writing import replacing

NAMES = ("circle", "rectangle", "triangle", "star", "ring", "cross", "crescent", "heart")
CATEGORIES = {name: i for i, name in enumerate(NAMES, start=1)}  # name -> category id
SPLITS = ("train2017", "val2017")

_VERSION = 2  # of the recipe below: a dataset on disk that another one wrote is not mistaken for the same
_EMPTY_FRACTION = 0.03  # of the images
_CROWD_FRACTION = 0.02  # of the images
_MIN_SIZE, _MAX_SIZE = 10, 100  # pixels across
_MIN_VISIBLE = 0.4  # of an object's area; below that it is taken out of the picture
_MAX_TILT = np.pi / 6  # radians either way; fully rotated shapes take a small network much longer to tell apart
_MIN_AREA = 12  # visible pixels
_MIN_CONTRAST = 110  # Euclidean distance in RGB between an object and what it is drawn on


@dataclass
class _Shape:
    """One drawn shape, on the part of the image that it touches."""

    category: int  # 0..7, position in NAMES
    rows: slice
    columns: slice
    distance: np.ndarray  # [rows, columns] float32, signed, pixels
    area: int  # pixels, those outside the image included


@dataclass
class _Object:
    """What one annotation describes: one shape, or the shapes of a crowd."""

    shapes: list[_Shape]
    crowd: bool
    mask: np.ndarray  # [size, size] bool, before occlusion
    visible: np.ndarray = field(init=False)  # [size, size] bool, after occlusion

    @property
    def area(self) -> int:
        return sum(shape.area for shape in self.shapes)


def _polygon_distance(x: np.ndarray, y: np.ndarray, vertices: np.ndarray) -> np.ndarray:
    """Compute the signed distance [n] of points from a polygon [V, 2]."""
    squared, inside = np.full(x.shape, np.inf, np.float32), np.zeros(x.shape, bool)
    for (x0, y0), (x1, y1) in zip(vertices.tolist(), np.roll(vertices, -1, axis=0).tolist(), strict=True):
        edge_x, edge_y, to_x, to_y = x1 - x0, y1 - y0, x - x0, y - y0
        along = np.clip((to_x * edge_x + to_y * edge_y) / (edge_x**2 + edge_y**2), 0, 1)
        np.minimum(squared, (to_x - along * edge_x) ** 2 + (to_y - along * edge_y) ** 2, out=squared)
        # A point is inside if a ray from it to the right crosses the outline oddly often.
        crosses = ((y0 <= y) != (y1 <= y)) & ((to_x * edge_y < to_y * edge_x) == (edge_y > 0))
        inside ^= crosses
    return np.sqrt(squared) * np.where(inside, np.float32(-1), np.float32(1))


def _regular(num: int, radii: tuple[float, ...] = (1.0,)) -> np.ndarray:
    """Return the ``num`` vertices of a polygon around the origin whose radii repeat."""
    angles = 2 * np.pi * np.arange(num) / num - np.pi / 2
    return np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.resize(radii, num)[:, None]


def _cross() -> np.ndarray:
    corner = np.array([[0.3, -1.0], [0.3, -0.3], [1.0, -0.3]])
    turn = np.array([[0, 1], [-1, 0]])  # a quarter, for row vectors
    return np.concatenate([corner @ np.linalg.matrix_power(turn, k) for k in range(4)])


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 41)[:-1]
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 17
    return np.stack([16 * np.sin(t) ** 3 / 17, y - 0.15], axis=1)


def _distance(category: int, x: np.ndarray, y: np.ndarray, radius: float, aspect: float) -> np.ndarray:
    """Compute the signed distance [n] of points from the outline of a class, upright around the origin."""
    name = NAMES[category]
    if name == "circle":
        return np.hypot(x, y) - radius
    if name == "ring":
        return np.abs(np.hypot(x, y) - 0.75 * radius) - 0.25 * radius
    if name == "crescent":
        bite = np.hypot(x - 0.5 * radius, y) - 0.8 * radius
        return np.maximum(np.hypot(x, y) - radius, -bite)
    if name == "rectangle":
        corners = np.array([[-1, -aspect], [1, -aspect], [1, aspect], [-1, aspect]])
        return _polygon_distance(x, y, radius * corners / np.hypot(1, aspect))
    outlines = {"triangle": _regular(3), "star": _regular(10, (1.0, 0.42)), "cross": _cross(), "heart": _heart()}
    return _polygon_distance(x, y, radius * outlines[name])


def _make_shape(
    rng: np.random.Generator, size: int, category: int, radius: float, center: tuple[float, float]
) -> _Shape | None:
    """Place a shape with a random tilt; None if the image shows nothing of it."""
    angle, aspect = rng.uniform(-_MAX_TILT, _MAX_TILT), rng.uniform(0.4, 1)
    reach = int(np.ceil(1.2 * radius)) + 2
    x0, y0 = int(center[0]) - reach, int(center[1]) - reach
    columns, rows = np.arange(x0, x0 + 2 * reach + 1), np.arange(y0, y0 + 2 * reach + 1)
    x, y = np.meshgrid(columns + 0.5 - center[0], rows + 0.5 - center[1])  # pixel centres
    x, y = x.astype(np.float32), y.astype(np.float32)
    turned_x = x * np.cos(angle) + y * np.sin(angle)
    turned_y = y * np.cos(angle) - x * np.sin(angle)
    distance = _distance(category, turned_x.ravel(), turned_y.ravel(), radius, aspect).reshape(x.shape)
    in_rows, in_columns = (rows >= 0) & (rows < size), (columns >= 0) & (columns < size)
    seen = distance[in_rows][:, in_columns].astype(np.float32)
    if not (seen < 0).any():
        return None
    top, left = max(y0, 0), max(x0, 0)
    return _Shape(
        category,
        slice(top, top + seen.shape[0]),
        slice(left, left + seen.shape[1]),
        seen,
        int((distance < 0).sum()),
    )


def _make_object(rng: np.random.Generator, size: int, crowd: bool, names: Sequence[str] = NAMES) -> _Object | None:
    category = NAMES.index(names[int(rng.integers(len(names)))])
    if crowd:
        spread, middle = 0.16 * size, rng.uniform(0.25, 0.75, 2) * size
        places = [(middle + rng.normal(0, spread, 2), rng.uniform(4, 7)) for _ in range(rng.integers(10, 21))]
    else:
        largest = max(min(_MAX_SIZE, 0.8 * size), _MIN_SIZE + 1)
        diameter = np.exp(rng.uniform(np.log(_MIN_SIZE), np.log(largest)))
        places = [(rng.uniform(0.1, 0.9, 2) * size, diameter / 2)]
    made = [_make_shape(rng, size, category, radius, tuple(center)) for center, radius in places]
    shapes = [shape for shape in made if shape is not None]
    if not shapes:
        return None
    mask = np.zeros((size, size), bool)
    for shape in shapes:
        mask[shape.rows, shape.columns] |= shape.distance < 0
    return _Object(shapes, crowd, mask)


def _occlude(objects: list[_Object]) -> list[_Object]:
    """Compute what is visible, later objects lying on top, and take out objects that are nearly hidden.

    One object is taken out at a time, because that uncovers others.
    """
    while True:
        if not objects:
            return objects
        covered = np.zeros_like(objects[0].mask)
        for item in reversed(objects):
            item.visible = item.mask & ~covered
            covered |= item.mask
        shown = [np.count_nonzero(item.visible) for item in objects]
        hidden = [
            index
            for index, (count, item) in enumerate(zip(shown, objects, strict=True))
            if count < max(_MIN_AREA, _MIN_VISIBLE * item.area)
        ]
        if not hidden:
            return objects
        worst = min(hidden, key=lambda index: shown[index] / objects[index].area)
        objects = objects[:worst] + objects[worst + 1 :]


def _color(rng: np.random.Generator, away_from: np.ndarray | None = None) -> np.ndarray:
    """Draw a colour, [3] float32 in 0..255, that can be told from another one."""
    while True:
        color = rng.uniform(10, 245, 3)
        if away_from is None or np.linalg.norm(color - away_from) > _MIN_CONTRAST:
            return color.astype(np.float32)


def _texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Draw a pattern, [height, width, 1] float32 in about -1..1."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    angle, period, phase = rng.uniform(0, np.pi), rng.uniform(5, 16), rng.uniform(0, 2 * np.pi)
    ramp = x * np.cos(angle) + y * np.sin(angle)
    kind = rng.integers(5)
    pattern: np.ndarray
    if kind == 0:  # plain
        pattern = np.zeros((height, width))
    elif kind == 1:  # stripes
        pattern = np.sin(2 * np.pi * ramp / period + phase)
    elif kind == 2:  # checks
        pattern = np.sin(2 * np.pi * x / period + phase) * np.sin(2 * np.pi * y / period + phase)
    elif kind == 3:  # gradient
        pattern = 2 * (ramp - ramp.min()) / max(np.ptp(ramp), 1) - 1
    else:  # clouds
        cells = rng.uniform(-1, 1, (int(height / period) + 2, int(width / period) + 2))
        pattern = cv2.resize(cells, (width, height), interpolation=cv2.INTER_CUBIC)
    return pattern.astype(np.float32)[:, :, None]


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
    cells = np.stack([_color(rng) for _ in range(9)]).reshape(3, 3, 3)
    base = cells.mean(axis=(0, 1)) + rng.uniform(0.1, 0.5) * (cells - cells.mean(axis=(0, 1)))
    smooth = cv2.resize(base.astype(np.float32), (size, size), interpolation=cv2.INTER_CUBIC)
    return smooth + rng.uniform(5, 25) * _texture(rng, size, size)


def _paint(rng: np.random.Generator, size: int, objects: list[_Object]) -> np.ndarray:
    """Draw the objects over a background, the last one on top; returns [size, size, 3] uint8 RGB."""
    canvas = _background(rng, size)
    for shape in (shape for item in objects for shape in item.shapes):
        patch = canvas[shape.rows, shape.columns]
        color = _color(rng, away_from=patch[shape.distance < 0].mean(axis=0))
        fill = color + rng.uniform(0, 20) * _texture(rng, *shape.distance.shape)
        alpha = np.clip(0.5 - shape.distance, 0, 1)[:, :, None]
        canvas[shape.rows, shape.columns] = alpha * fill + (1 - alpha) * patch
    canvas += rng.normal(0, rng.uniform(0, 6), canvas.shape)
    return np.clip(canvas, 0, 255).round().astype(np.uint8)


def draw_image(
    rng: np.random.Generator, size: int, categories: Mapping[str, int] = CATEGORIES
) -> tuple[np.ndarray, list[dict]]:
    """Draw one image.

    Args:
        rng: decides everything.
        size: pixels, both sides.
        categories: the classes to draw, some of NAMES, and their ids.

    Returns:
        The image [size, size, 3] uint8 RGB, and the fields ``category_id``, ``bbox``, ``area``, ``iscrowd`` and
        ``segmentation`` of each annotation.
    """
    placed: list[_Object | None] = []
    names = list(categories)
    if rng.random() >= _EMPTY_FRACTION:
        placed = [_make_object(rng, size, False, names) for _ in range(rng.integers(1, 8))]
        if rng.random() < _CROWD_FRACTION / (1 - _EMPTY_FRACTION):
            placed.insert(int(rng.integers(len(placed) + 1)), _make_object(rng, size, True, names))
    objects = _occlude([item for item in placed if item is not None])
    return _paint(rng, size, objects), [_annotate(item, categories) for item in objects]


def _annotate(item: _Object, categories: Mapping[str, int]) -> dict:
    rows, columns = np.flatnonzero(item.visible.any(axis=1)), np.flatnonzero(item.visible.any(axis=0))
    x, y = int(columns[0]), int(rows[0])
    return {
        "category_id": categories[NAMES[item.shapes[0].category]],
        "bbox": [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y],
        "area": int(item.visible.sum()),
        "iscrowd": int(item.crowd),
        "segmentation": _segmentation(item.visible, item.crowd),
    }


def _segmentation(mask: np.ndarray, crowd: bool) -> list[list[int]] | dict:
    """Describes a mask exactly: by polygons along the pixel edges, or by run lengths where polygons cannot (holes)."""
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    if not crowd:
        # OpenCV follows the centres of border pixels. In a raster three times as fine these lie within half a coarse
        # pixel of the corners on the pixel edges, which rounding finds: columns 3 i .. 3 i + 2 become i and i + 1.
        fine = cv2.resize(mask.astype(np.uint8), None, fx=3, fy=3, interpolation=cv2.INTER_NEAREST)
        contours, _ = cv2.findContours(fine, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
        polygons = [_without_repeats((contour[:, 0] + 1) // 3).ravel().tolist() for contour in contours]
        drawn = coco_mask.merge(coco_mask.frPyObjects(polygons, *mask.shape))
        if drawn["counts"] == rle["counts"]:
            return polygons
    return {"size": rle["size"], "counts": rle["counts"].decode("ascii")}


def _without_repeats(points: np.ndarray) -> np.ndarray:
    return points[(points != np.roll(points, 1, axis=0)).any(axis=1)]


def write_dataset(
    output_dir: str | os.PathLike,
    *,
    num_train: int,
    num_val: int,
    image_size: int = 128,
    seed: int = 0,
    categories: Mapping[str, int] = CATEGORIES,
    splits: tuple[str, str] = SPLITS,
) -> None:
    """Write ``train2017/ val2017/ annotations/instances_{train,val}2017.json``, unless they are there already.

    The folder appears when it is complete, so that an interrupted call leaves nothing that looks like a dataset.

    Args:
        output_dir: the folder to make.
        num_train: training images.
        num_val: validation images.
        image_size: pixels, both sides.
        seed: decides every pixel.
        categories: the classes to draw, some of NAMES, and their ids.
        splits: names of the two folders.

    Raises:
        UserError: the folder holds something else, a number is too small or a class unknown.
    """
    output_dir = local_path(output_dir, "the dataset")
    recipe: dict[str, Any] = {"version": _VERSION, "num_train": num_train, "num_val": num_val}
    recipe |= {"image_size": image_size, "seed": seed}
    recipe |= {"categories": dict(categories)} if categories != CATEGORIES else {}
    recipe |= {"splits": list(splits)} if splits != SPLITS else {}
    if num_train < 1 or num_val < 1 or image_size < 32 or seed < 0:
        raise UserError(f"{recipe} cannot be made; at least 1 image a split, 32 pixels a side and seed 0 are needed")
    unknown = [name for name in categories if name not in NAMES]
    if unknown or not categories or len(set(categories.values())) < len(categories) or len(set(splits)) < 2:
        raise UserError(
            f"{recipe} cannot be made; choose some of {', '.join(NAMES)}, each with its own id, and two splits"
        )
    if _is_finished(output_dir, recipe):
        return
    with replacing(output_dir) as unfinished:
        (unfinished / "annotations").mkdir(parents=True)
        for split, (name, num) in enumerate(zip(splits, (num_train, num_val), strict=True)):
            _write_split(unfinished, name, num, image_size, [seed, split], categories)
        (unfinished / "shapes.json").write_text(json.dumps(recipe) + "\n")


def _is_finished(output_dir: Path, recipe: dict) -> bool:
    if not output_dir.exists() or (output_dir.is_dir() and not any(output_dir.iterdir())):
        return False
    try:
        found = json.loads((output_dir / "shapes.json").read_text())
    except (OSError, ValueError):
        found = "other files"
    if found != recipe:
        raise UserError(f"{output_dir} holds {found}, not {recipe}; delete it or name another folder")
    return True


def _write_split(
    root: Path, name: str, num: int, image_size: int, seed: list[int], categories: Mapping[str, int]
) -> None:
    (root / name).mkdir()
    size = {"height": image_size, "width": image_size}
    images: list[dict] = []
    annotations: list[dict] = []
    for image_id in tqdm(range(1, num + 1), desc=f"drawing {name}", unit="image"):
        image, objects = draw_image(np.random.default_rng([*seed, image_id]), image_size, categories)
        file_name = f"{image_id:012d}.jpg"
        data = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 95])[1]
        (root / name / file_name).write_bytes(data.tobytes())
        images.append({"id": image_id, "file_name": file_name, **size, "license": 1})
        for fields in objects:
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, **fields})
    content = {
        "info": {"description": "Shapes, drawn by maskrcnn_jax.data.shapes", "version": str(_VERSION)},
        "licenses": [{"id": 1, "name": "same as the program that drew them", "url": ""}],
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": name, "supercategory": "shape"} for name, i in categories.items()],
    }
    (root / "annotations" / f"instances_{name}.json").write_text(json.dumps(content))


def _parse_categories(text: str) -> dict[str, int]:
    return {name: int(number) for name, number in (item.split(":") for item in text.split(","))}


def main() -> int:
    parser = argparse.ArgumentParser(description="Writes a synthetic dataset of shapes in COCO's format.")
    parser.add_argument("output_dir")
    parser.add_argument("--train", type=int, default=4000, dest="num_train", help="training images")
    parser.add_argument("--val", type=int, default=500, dest="num_val", help="validation images")
    parser.add_argument("--size", type=int, default=128, dest="image_size", help="pixels, both sides of every image")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--categories", type=_parse_categories, default=CATEGORIES, help="NAME:ID,NAME:ID,...")
    parser.add_argument("--splits", type=lambda text: tuple(text.split(",")), default=SPLITS, help="TRAIN,VAL")
    try:
        write_dataset(**vars(parser.parse_args()))
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
