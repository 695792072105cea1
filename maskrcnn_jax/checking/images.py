"""Problems of image files, and of masks that show only when they are rasterised."""

import hashlib
import io
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageFile
from pycocotools import mask as coco_mask

from maskrcnn_jax.checking.annotations import MISMATCH, misfits
from maskrcnn_jax.checking.examples import NUM_EXAMPLES, annotations_finding, images_finding
from maskrcnn_jax.data.coco import CocoDataset
from maskrcnn_jax.data.findings import Finding, Kind
from maskrcnn_jax.data.formats import overlaps
from maskrcnn_jax.data.image_headers import orientation
from maskrcnn_jax.data.images import BrokenImageError
from maskrcnn_jax.paths import read_bytes

# Which are read, but perhaps not as expected.
_FORMS = (Kind.TURNED, Kind.GREY, Kind.CMYK, Kind.DEEP, Kind.ALPHA, Kind.FRAMES)


@dataclass
class ImageFacts:
    """What is known about one image after it was read."""

    broken: str = ""  # the reader's error
    pixels: bytes = b""  # their hash
    forms: set[Kind] = field(default_factory=set)
    empty_masks: list[int] = field(default_factory=list)  # rows of annotations
    misfits: dict[int, np.ndarray] = field(default_factory=dict)  # row -> [4] the box around its run-length mask


def read_images(index: CocoDataset, images: Iterable[int], *, channels: int, threads: int) -> Iterator[ImageFacts]:
    """Read images and rasterise their masks, in order.

    Args:
        index: of the split.
        images: rows of the index.
        channels: of the model's images.
        threads: number of threads that read and decode.
    """
    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(lambda i: _read_facts(index, i, channels), images)


def check_images(
    index: CocoDataset, images: np.ndarray, facts: list[ImageFacts], *, skip_broken: bool = False
) -> list[Finding]:
    """Return the findings about images that were read.

    Args:
        index: of the split.
        images: [n] rows of the index.
        facts: [n] of these images.
        skip_broken: training continues without images that cannot be read.

    Returns:
        Findings, with rows of the index.
    """
    found = [*_broken(index, images, facts, skip_broken), *_copies(index, images, facts)]
    for kind in _FORMS:
        chosen = images[[kind in fact.forms for fact in facts]]
        found += images_finding(index, kind, chosen, total=len(images))
    empty = np.array([row for fact in facts for row in fact.empty_masks], np.int64)
    around = {row: box for fact in facts for row, box in fact.misfits.items()}
    found += annotations_finding(index, Kind.EMPTY_MASK, empty)
    return found + misfits(index, np.array(list(around), np.int64), around)


def _broken(index: CocoDataset, images: np.ndarray, facts: list[ImageFacts], skip_broken: bool) -> list[Finding]:
    errors = [fact.broken for fact in facts if fact.broken]
    if not errors:
        return []
    rows = images[[bool(fact.broken) for fact in facts]]
    examples = errors[:NUM_EXAMPLES] if len(errors) > 1 else [str(index.file_names[rows[0]])]
    return [Finding(Kind.BROKEN, Kind.BROKEN.severity.is_error(skip_broken=skip_broken), errors[0], rows, examples)]


def _copies(index: CocoDataset, images: np.ndarray, facts: list[ImageFacts]) -> list[Finding]:
    first: dict[bytes, int] = {}  # by hash, the earliest image
    original = {}
    for image, fact in zip(images.tolist(), facts, strict=True):
        if fact.pixels:
            original[image] = first.setdefault(fact.pixels, image)
    names = index.file_names
    # A file that is listed twice is another finding.
    copies = np.array([i for i, other in original.items() if names[i] != names[other]], np.int64)
    examples = [f"{names[i]} = {names[original[i]]}" for i in copies[:NUM_EXAMPLES].tolist()]
    return [Kind.SAME_PIXELS.finding(copies, examples=examples)] if len(copies) else []


def _read_facts(index: CocoDataset, i: int, channels: int) -> ImageFacts:
    facts = ImageFacts()
    try:
        image = index.read_image(i, channels)
    except BrokenImageError as error:
        facts.broken = str(error)
        return facts
    try:
        data = read_bytes(index.image_path(i))
        with Image.open(io.BytesIO(data)) as opened:
            facts.forms = _forms(opened, channels)
        if orientation(data) != 1:
            facts.forms.add(Kind.TURNED)
    except Exception:  # Pillow raises many kinds of errors, also for files that OpenCV reads
        pass
    facts.pixels = hashlib.blake2b(image.data, digest_size=16, person=f"{image.shape[1]}".encode()).digest()
    for row in range(index.offsets[i], index.offsets[i + 1]):
        if index.num_parts[row] >= 0:
            _check_mask(index, i, row, facts)
    return facts


def _forms(opened: ImageFile.ImageFile, channels: int) -> set[Kind]:
    forms = set()
    if opened.mode in ("1", "L", "LA", "F") or opened.mode.startswith("I"):
        forms.add(Kind.GREY)
    if opened.mode == "CMYK":
        forms.add(Kind.CMYK)
    if opened.mode in ("I", "F") or ";16" in str(opened.tile):
        forms.add(Kind.DEEP)
    if opened.mode in ("LA", "PA", "RGBA", "RGBa") and channels == 3:
        forms.add(Kind.ALPHA)
    # Photographs in MPO have previews and depth beside them.
    if opened.format != "MPO" and getattr(opened, "n_frames", 1) > 1:
        forms.add(Kind.FRAMES)
    return forms


def _check_mask(index: CocoDataset, i: int, row: int, facts: ImageFacts) -> None:
    height, width = map(int, index.sizes[i])
    rle = index.rle(row, height, width)
    if not coco_mask.area(rle):
        facts.empty_masks.append(row)
    elif index.num_parts[row] == 0:
        x, y, w, h = coco_mask.toBbox(rle).tolist()
        around = np.array([x, y, x + w, y + h])
        if overlaps(index.boxes[row : row + 1], around[None])[0] < MISMATCH:
            facts.misfits[row] = around
