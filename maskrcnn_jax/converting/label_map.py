"""Instance masks that are images: every value or colour is an object, 0 or black is background."""

import io
import warnings
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import BITSPERSAMPLE, TiffImageFile
from pycocotools import mask as coco_mask

from maskrcnn_jax.converting.source import Object, image_size, read_bytes
from maskrcnn_jax.errors import UserError

_MOST_BYTES = 1 << 29
_MOST_PIXELS = 1 << 27
_MOST_OBJECTS = 1 << 16  # in an image; what has more is a photograph
_ENOUGH_PIXELS, _SHORTEST_RUN = 1 << 14, 4  # shorter on average: the values are no objects
_HOW = "each object needs one value or colour of its own, and 0 or black is background"


class Region(NamedTuple):
    """The pixels of one value."""

    value: int
    rle: dict  # pycocotools' compressed run lengths, as text
    box: list[float]  # x, y, width, height in pixels
    area: int  # in pixels

    def to_object(self, category: int) -> Object:
        """Return the region as an object of a category."""
        return Object(category, self.rle, self.box, float(self.area))


def read_label_map(path: Path, size: tuple[int, int], *, palette: bool = False) -> np.ndarray:
    """Read an instance mask.

    Args:
        path: PNG or TIFF of 8, 16 or 32 bits, grey, with a palette, or in colours.
        size: (height, width) of its image.
        palette: return the colours of a palette instead of its indices.

    Returns:
        [h, w] int64; colours are ``red << 32 | green << 16 | blue``.

    Raises:
        UserError: it is no such file, or has another size.
    """
    found = image_size(path)
    if found != size or size[0] * size[1] > _MOST_PIXELS:
        limit = f" and at most {_MOST_PIXELS:,} pixels" if found == size else ""
        raise UserError(
            f"the mask {path} has {found[0]}x{found[1]} pixels (height x width), but must have {size[0]}x{size[1]} "
            f"as its image{limit}; write it at the size of the image"
        )
    labels = _decode(path, palette)
    if labels is None or labels.shape != size:
        raise UserError(f"the mask {path} cannot be decoded as a PNG or TIFF of whole numbers or colours; {_HOW}")
    return labels


def _decode(path: Path, palette: bool) -> np.ndarray | None:
    """Return the labels, None if the file has something else."""
    data = read_bytes(path, _MOST_BYTES)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                if image.format not in ("PNG", "TIFF", "BMP", "GIF") or getattr(image, "n_frames", 1) > 1:
                    return None
                mode, pixels = image.mode, np.asarray(image.convert("RGB") if palette else image)
                if mode in ("RGB", "RGBA") and _has_16_bits(image, data):  # of which Pillow keeps 8
                    pixels = _decode_colours(data)
    except Exception:  # both raise all sorts of things at broken files
        return None
    if pixels.ndim == 3:
        return _colours(pixels) if mode in ("RGB", "RGBA", "P") else pixels[..., 0].astype(np.int64)
    if not np.isfinite(pixels).all() or np.abs(pixels.astype(np.float64)).max(initial=0) >= 2**53:
        return None
    labels = pixels.astype(np.int64)
    return labels if (labels == pixels).all() else None


def _has_16_bits(image: Image.Image, data: bytes) -> bool:
    if image.format == "PNG":
        return data[24] == 16
    return isinstance(image, TiffImageFile) and 16 in image.tag_v2.get(BITSPERSAMPLE, ())


def _decode_colours(data: bytes) -> np.ndarray:
    """Decode an image with OpenCV; raises whatever there is for broken files."""
    chunks, start = [data[:8]], 8
    while data.startswith(b"\x89PNG") and start < len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")  # length, name and checksum
        # Of a length beyond the file, libpng would take the memory before it reads it.
        if end <= len(data) and data[start + 4 : start + 8] in (b"IHDR", b"IDAT", b"tRNS", b"IEND"):
            chunks.append(data[start:end])
        start = end
    data = b"".join(chunks) if len(chunks) > 1 else data
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None:
        raise ValueError("no image")
    return np.concatenate([pixels[..., 2::-1], pixels[..., 3:]], axis=2)


def _colours(pixels: np.ndarray) -> np.ndarray:
    """Return a number for each colour; what is transparent is background."""
    red, green, blue = (pixels[..., i].astype(np.int64) for i in range(3))
    colours = red << 32 | green << 16 | blue
    return np.where(pixels[..., 3] > 0, colours, 0) if pixels.shape[2] == 4 else colours


def regions(labels: np.ndarray, path: Path) -> list[Region]:
    """Return the regions of all values but 0, in time and memory of the pixels, however many there are.

    Args:
        labels: [h, w] int64.
        path: of the file that they come from, for errors.

    Raises:
        UserError: there are far too many, as in a photograph or a picture that was smoothed or compressed.
    """
    flat = labels.T.ravel()  # column after column, as run lengths are
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    values = flat[starts]
    order = np.argsort(values, kind="stable")
    distinct, first = np.unique(values[order], return_index=True)
    if len(distinct) > _MOST_OBJECTS or (flat.size > _ENOUGH_PIXELS and len(starts) * _SHORTEST_RUN > flat.size):
        raise UserError(
            f"the mask {path} has {len(distinct):,} different values in {len(starts):,} pieces, so it is a photograph "
            f"or was smoothed or compressed; {_HOW}"
        )
    ends = np.append(starts[1:], flat.size)
    found = []
    for value, runs in zip(distinct.tolist(), np.split(order, first[1:]), strict=True):
        if value:
            found.append(_region(value, starts[runs], ends[runs], labels.shape))
    return found


def _region(value: int, starts: np.ndarray, ends: np.ndarray, size: tuple[int, ...]) -> Region:
    """Make a region from the pieces of its value, in places of the flattened image."""
    height, width = size
    gaps = starts - np.concatenate([[0], ends[:-1]])
    counts = [*np.stack([gaps, ends - starts], axis=1).ravel().tolist(), height * width - int(ends[-1])]
    rle = coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    box = coco_mask.toBbox(rle).tolist()
    text = {"size": [height, width], "counts": rle["counts"].decode()}
    return Region(value, text, box, int((ends - starts).sum()))
