"""Reads YOLO's segmentation layout: a YAML file with the class names, images, and a text file of polygons for each.

A line of a text file is a class number and x, y, x, y ... in fractions of the image, or x, y of the middle, width and
height for an object with a box only. The format has no holes, and no objects of several parts.
"""

import logging
import math
import os
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from maskrcnn_jax.converting.source import (
    Object,
    Picture,
    Source,
    common_folder,
    image_form,
    inside,
    read_text,
    with_polygons,
)
from maskrcnn_jax.data.file_names import plain_name
from maskrcnn_jax.data.images import IMAGE_SUFFIXES
from maskrcnn_jax.data.layouts import describe, folders_in, yaml_of
from maskrcnn_jax.data.orientation import turn_back, upright_size
from maskrcnn_jax.errors import UserError

_log = logging.getLogger(__name__)

_SPLITS = ("train", "val", "test")
_MARGIN = 0.1  # of the image, by which tools let polygons pass its border


def read_yolo(root: Path) -> Source:
    """Open a dataset in YOLO's layout.

    Args:
        root: folder with the YAML file, or with images/, labels/ and classes.txt; an absolute path.

    Raises:
        UserError: the names or the folders are missing or malformed; and, when a split is read, the same of labels.
    """
    path = yaml_of(root)
    if path is None:
        return _without_yaml(root)
    try:
        # Without conversions, by which a class called "no" would be False.
        content = yaml.load(read_text(path), yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UserError(f"{path} is not valid YAML ({' '.join(str(error).split())[:120]}); correct it") from None
    names = _names(content, path)
    splits = {}
    for split in _SPLITS:
        given = content.get(split)
        if given:
            parts = _strings(given, split, path)
            if split != "train" and not any(_find(root, _base(root, content), part) for part in parts):
                # Roboflow names a test split whether there is one or not.
                shown = parts[0][:100]  # quoted, because the text of a file may have letters that no terminal shows
                _log.warning("%s names %r as its %s split, which is not there and is left out", path, shown, split)
                continue
            images = [image for part in parts for image in _images(root, content, part, path)]
            splits[split] = partial(_pictures, root, list(dict.fromkeys(images)), names, path)
    if not splits:
        raise UserError(f"{path} has no train, val or test; name their folders of images, such as train: images/train")
    return Source({number + 1: name for number, name in names.items()}, splits)


def _without_yaml(root: Path) -> Source:
    """Open what Label Studio and others write: images/, labels/ and classes.txt."""
    path = root / "classes.txt"
    if not path.is_file() or not (root / "images").is_dir():
        raise UserError(
            f"{root} has YOLO's labels/ but neither a data.yaml, with train, val and names, nor images/ and a "
            "classes.txt with a class name on each line; add one of these"
        )
    names = dict(enumerate(line.strip() for line in read_text(path).splitlines() if line.strip()))
    folders = {folder.name: folder for folder in folders_in(root / "images") if folder.name in _SPLITS}
    found = {split: _files(folder) for split, folder in (folders or {"train": root / "images"}).items()}
    splits = {split: partial(_pictures, root, images, names, path) for split, images in found.items()}
    return Source({number + 1: name for number, name in names.items()}, splits)


def _names(content: Any, path: Path) -> dict[int, str]:
    names = content.get("names") if isinstance(content, dict) else None
    if isinstance(names, list):
        names = {str(number): name for number, name in enumerate(names)}
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise UserError(f"{path} has no list of names; write the classes as names: [first, second, ...]")
    wrong = [number for number in names if not (isinstance(number, str) and number.isdecimal() and len(number) < 6)]
    if wrong:
        raise UserError(f"{path} numbers a class {str(wrong[0])[:40]!r}; number them 0, 1, 2, ...")
    count = content.get("nc")
    if isinstance(count, str) and count.isdecimal() and count != str(len(names)):
        raise UserError(f"{path} has {len(names)} names but nc: {count[:20]}; correct one of them")
    return {int(number): name for number, name in names.items()}


def _strings(given: Any, split: str, path: Path) -> list[str]:
    parts = given if isinstance(given, list) else [given]
    if not all(isinstance(part, str) and "\0" not in part for part in parts):
        raise UserError(f"{path} has a {split} that is not a path; write the folder of its images")
    return parts


def _images(root: Path, content: dict, given: str, path: Path) -> list[Path]:
    """Return the image files of a folder or a list of files that the YAML file names."""
    found = _find(root, _base(root, content), given)
    if found is None:
        raise UserError(
            f"{path} names {given[:100]!r}, which is not in {root}; correct the path or move the images there"
        )
    images = _listed(root, found) if found.suffix == ".txt" else _files(found)
    if not images:
        raise UserError(f"{path} names {found}, which has no images but {describe(found)}; add them")
    return images


def _base(root: Path, content: dict) -> Path:
    """Return the folder that the paths of a YAML file are relative to."""
    base = content.get("path")
    return root / base if isinstance(base, str) and "\0" not in base and len(base) < 1000 else root


def _find(root: Path, folder: Path, given: str) -> Path | None:
    """Find a path below ``root``, in ``folder`` or without the first folders that are given; None if there is none.

    Exports have ../ too many, or the folders of another computer.
    """
    given = given.replace("\\", "/")
    words = [word for word in Path(given).parts if word not in ("..", ".", "/")]
    for candidate in (folder / given, *(root.joinpath(*words[i:]) for i in range(len(words)))):
        candidate = Path(os.path.abspath(candidate))
        if len(given) < 1000 and candidate.is_relative_to(root) and os.path.exists(candidate):
            return candidate
    return None


def _files(folder: Path) -> list[Path]:
    found = (path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    return sorted(path for path in found if not path.name.startswith("."))  # macOS adds ._1.jpg to 1.jpg


def _listed(root: Path, path: Path) -> list[Path]:
    lines = [line.strip() for line in read_text(path).splitlines()]
    return [_find(root, root, line) or inside(root, root / line, path) for line in lines if line]


def _pictures(root: Path, images: list[Path], names: dict[int, str], names_path: Path) -> Iterator[Picture]:
    labels = _label_paths(root, images)
    if not any(path.is_file() for path in labels.values()):
        image, path = next(iter(labels.items()), (root / "images", root / "labels"))
        raise UserError(
            f"none of the {len(images)} images has a text file of labels, such as {path} for {image}; add them"
        )
    folder = common_folder(images)
    for image, path in labels.items():
        size, orientation = image_form(image)
        lines = read_text(path).splitlines() if path.is_file() else []
        objects = [
            _object(line, size, orientation, names, names_path, f"{path}, line {number},")
            for number, line in enumerate(lines, start=1)
            if line.strip()
        ]
        yield Picture(image, image.relative_to(folder).as_posix(), size, objects)


def _label_paths(root: Path, images: list[Path]) -> dict[Path, Path]:
    """Return the text file of each image; where its name is in another form, such as with %20 for a space, that."""
    labels = {image: _label_path(root, image) for image in images}
    absent = [image for image, path in labels.items() if not path.is_file()]
    others = defaultdict(list)
    for folder in {labels[image].parent for image in absent}:
        for path in folder.glob("*.txt"):
            others[folder, plain_name(path.name)].append(path)
    for image in absent:
        alike = others[labels[image].parent, plain_name(labels[image].name)]
        labels[image] = alike[0] if len(alike) == 1 else labels[image]
    return labels


def _label_path(root: Path, image: Path) -> Path:
    """Return the text file of an image: in labels/ instead of the last images/, or else beside it."""
    parts = list(image.relative_to(root).parts)
    if "images" in parts[:-1]:
        last = len(parts) - 2 - parts[-2::-1].index("images")
        path = root.joinpath(*parts[:last], "labels", *parts[last + 1 :]).with_suffix(".txt")
        if path.is_file() or not image.with_suffix(".txt").is_file():
            return path
    return image.with_suffix(".txt")


def _object(
    line: str, size: tuple[int, int], orientation: int, names: dict[int, str], names_path: Path, where: str
) -> Object:
    first, *rest = line.split()
    number = int(first) if first.isdecimal() and len(first) < 6 else -1
    if number not in names:
        raise UserError(
            f"{where} has class {first[:40]!r}, but {names_path} has classes 0 to {max(names)}; correct one of them"
        )
    values = [_number(word) for word in rest]
    wrong = [word for word, value in zip(rest, values, strict=True) if not -_MARGIN <= value <= 1 + _MARGIN]
    if wrong:
        raise UserError(
            f"{where} has a coordinate {wrong[0][:40]!r}; YOLO's are fractions of the image from 0 to 1, so divide by "
            "its width and height"
        )
    if len(values) == 4:
        x, y, w, h = values
        (x1, y1), (x2, y2) = np.sort(_pixels([x - w / 2, y - h / 2, x + w / 2, y + h / 2], size, orientation), axis=0)
        return Object(number + 1, None, [float(v) for v in (x1, y1, x2 - x1, y2 - y1)], float((x2 - x1) * (y2 - y1)))
    if len(values) < 6 or len(values) % 2:
        raise UserError(
            f"{where} has {len(values)} numbers after the class; a polygon needs an even number, at least 6, a box 4"
        )
    # To COCO's precision, which undoes the rounding of fractions where it would move a border by a pixel.
    return with_polygons(number + 1, [_pixels(values, size, orientation).round(2).ravel().tolist()])


def _pixels(shares: list[float], size: tuple[int, int], orientation: int) -> np.ndarray:
    """Return points in pixels as stored, [n, 2]; YOLO's tools read images upright, as OpenCV does."""
    points = np.array(shares, np.float64).reshape(-1, 2) * upright_size(size, orientation)[::-1]
    return turn_back(points, size, orientation)


def _number(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        return math.nan
