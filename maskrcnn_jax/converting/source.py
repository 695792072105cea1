"""What the readers of the formats have in common: the images and objects that they yield, and how files are read."""

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from maskrcnn_jax import paths
from maskrcnn_jax.data import image_headers
from maskrcnn_jax.errors import UserError

_MOST_PIXELS = 178_956_970  # that Pillow, with which masks are read, decodes


class Object(NamedTuple):
    """An object as an annotation of COCO's format has it."""

    category: int  # id
    segmentation: list[list[float]] | dict | None  # polygons, run lengths with text, or None for a box only
    box: list[float]  # x, y, width, height in pixels
    area: float  # in pixels


class Picture(NamedTuple):
    """An image file and its objects."""

    path: Path
    name: str  # relative, unique in its split
    size: tuple[int, int]  # height, width
    objects: list[Object]


class Source(NamedTuple):
    """A dataset in another format."""

    categories: dict[int, str]  # id -> name
    splits: Mapping[str, Callable[[], Iterator[Picture]]]


def with_polygons(category: int, polygons: list[list[float]]) -> Object:
    """Make an object from polygons x, y, x, y ..., each of three points or more, in pixels."""
    parts = [np.array(polygon, np.float64).reshape(-1, 2) for polygon in polygons]
    points = np.concatenate(parts)
    (x1, y1), (x2, y2) = points.min(axis=0).tolist(), points.max(axis=0).tolist()
    return Object(category, polygons, [x1, y1, x2 - x1, y2 - y1], sum(map(_area, parts)))


def _area(points: np.ndarray) -> float:
    x, y = (np.concatenate([points, points[:1]]) - points[0]).T
    return float(abs(x[:-1] @ y[1:] - x[1:] @ y[:-1]) / 2)


def common_folder(images: list[Path]) -> Path:
    """Return the deepest folder that all of these files are in; names relative to it are short and unique."""
    return Path(os.path.commonpath([image.parent for image in images]))


def read_bytes(path: Path, most: int) -> bytes:
    """Read a file of at most so many bytes.

    Raises:
        UserError: it is larger, or cannot be read.
    """
    try:
        size = path.stat().st_size
        if size > most:
            raise UserError(f"{path} has {size:,} bytes, but such a file should have at most {most:,}; remove it")
        return paths.read_bytes(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check the path and its permissions") from None


def read_text(path: Path, most: int = 1 << 26) -> str:
    """Read a file of UTF-8 text, as ``read_bytes`` does."""
    try:
        return read_bytes(path, most).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; convert it to UTF-8") from None


def image_size(path: Path) -> tuple[int, int]:
    """Read the (height, width) of an image file from its header.

    Raises:
        UserError: it is no image, or one of absurd size.
    """
    return _size(path, _content(path))


def image_form(path: Path) -> tuple[tuple[int, int], int]:
    """Read the (height, width) of an image file and its EXIF orientation, 1 to 8.

    Other tools show images upright and annotate them so, while this package takes the pixels as they are stored.

    Raises:
        UserError: as in ``image_size``.
    """
    data = _content(path)
    return _size(path, data), image_headers.orientation(data)


def _content(path: Path) -> bytes:
    try:
        return paths.read_bytes(path)
    except (OSError, ValueError):  # missing, or a name that no file can have
        return b""


def _size(path: Path, data: bytes) -> tuple[int, int]:
    size = image_headers.image_size(data)
    if size is None:
        raise UserError(f"{path} is missing or not an image; add it, or remove its annotations")
    if size[0] * size[1] > _MOST_PIXELS:
        raise UserError(f"{path} claims more than 178 million pixels; scale it down or remove it")
    return size


def inside(root: Path, path: Path, named_by: Path) -> Path:
    """Return a path in normal form.

    Args:
        root: folder that it must lie in.
        path: as a file of the dataset gives it; links are not followed.
        named_by: that file.

    Raises:
        UserError: it lies outside, so that a foreign dataset cannot pull in other files of the user.
    """
    normal, base = (Path(os.path.abspath(p)) for p in (path, root))
    if "\0" in str(path) or not normal.is_relative_to(base):
        shown = str(path)[-100:].encode("ascii", "backslashreplace").decode()
        raise UserError(f"{named_by} names {shown!r}, which is not in {root}; move the files into this folder")
    return normal
