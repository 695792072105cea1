"""What is wrong, or odd, in the image files of a dataset, and in masks that only rasterising shows."""

import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from maskrcnn_jax.checking.annotations import (
    MISMATCH,
    NUM_EXAMPLES,
    Finding,
    empty_mask_finding,
    images_finding,
    misfit_finding,
)
from maskrcnn_jax.data.coco import CocoDataset
from maskrcnn_jax.data.formats import overlaps
from maskrcnn_jax.data.images import BrokenImageError

BROKEN = "images that cannot be read"
SAME_PIXELS = "images with the pixels of another one"

# Forms of image files that are read, but perhaps not as somebody expects.
TURNED = "images stored turned"
GREY = "grey images"
CMYK = "images in CMYK"
DEEP = "images of more than 8 bits a channel"
ALPHA = "images with an alpha channel"
_FORMS = {
    TURNED: "have an orientation in EXIF, which is ignored: boxes and masks must refer to the pixels as stored",
    GREY: "are grey and become three equal channels",
    CMYK: "are in CMYK, for printing, and are converted to RGB without their colour profile",
    DEEP: "have more than 8 bits a channel, of which the upper 8 are kept: dark where a camera used fewer bits",
    ALPHA: "have an alpha channel, which is dropped",
}
_ORIENTATION = 0x0112  # in EXIF


@dataclass
class ImageFacts:
    """What was found out about one image."""

    broken: str = ""  # the sentence of the reader
    pixels: bytes = b""  # a hash of them
    forms: set[str] = field(default_factory=set)
    empty_masks: list[int] = field(default_factory=list)  # rows of annotations
    misfits: dict[int, np.ndarray] = field(default_factory=dict)  # row -> [4] the box around its run-length mask


def look_at_images(index: CocoDataset, images: Iterable[int], *, channels: int, threads: int) -> Iterator[ImageFacts]:
    """Reads images and rasterises their masks, in order.

    Args:
        index: of the split.
        images: rows of the index.
        channels: of the images that the model takes.
        threads: that read and decode.
    """
    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(lambda i: _look_at(index, i, channels), images)


def image_findings(
    index: CocoDataset, images: np.ndarray, facts: list[ImageFacts], *, skip_broken: bool = False
) -> list[Finding]:
    """Sums up what was found out about images.

    Args:
        index: of the split.
        images: [n] rows of the index.
        facts: n, of these images.
        skip_broken: training goes on without images that cannot be read.

    Returns:
        Findings, with rows of the index.
    """

    def rows(chosen: Iterable) -> np.ndarray:
        return images[np.flatnonzero(list(chosen))]

    found = []
    broken = [fact.broken for fact in facts if fact.broken]
    if broken:
        finding = images_finding(index, BROKEN, rows(fact.broken for fact in facts), broken[0], not skip_broken)
        found.append(replace(finding, examples=broken[:NUM_EXAMPLES] if len(broken) > 1 else finding.examples))
    first: dict[bytes, int] = {}
    for image, fact in zip(images.tolist(), facts, strict=True):
        if fact.pixels:
            first.setdefault(fact.pixels, image)
    copies = rows(fact.pixels and first[fact.pixels] != image for image, fact in zip(images, facts, strict=True))
    original = {image: first[fact.pixels] for image, fact in zip(images.tolist(), facts, strict=True) if fact.pixels}
    # An image that is listed twice is another finding.
    copies = np.array([i for i in copies.tolist() if index.file_names[i] != index.file_names[original[i]]], np.int64)
    finding = images_finding(
        index, SAME_PIXELS, copies, f"{len(copies)} images have the pixels of another one; keep one of each"
    )
    if finding:
        pairs = [f"{index.file_names[i]} = {index.file_names[original[i]]}" for i in copies[:NUM_EXAMPLES].tolist()]
        found.append(replace(finding, examples=pairs))
    for form, text in _FORMS.items():
        chosen = rows(form in fact.forms for fact in facts)
        found.append(images_finding(index, form, chosen, f"{len(chosen)} of {len(images)} images {text}"))
    return [finding for finding in (*found, *_mask_findings(index, facts)) if finding]


def _mask_findings(index: CocoDataset, facts: list[ImageFacts]) -> Iterator[Finding | None]:
    empty = np.array([row for fact in facts for row in fact.empty_masks], np.int64)
    yield empty_mask_finding(index, empty)
    misfits = {row: box for fact in facts for row, box in fact.misfits.items()}
    bounds = np.full((len(index.boxes), 4), np.nan) if misfits else np.zeros((0, 4))
    for row, box in misfits.items():
        bounds[row] = box
    yield misfit_finding(index, np.array(list(misfits), np.int64), bounds)


def _look_at(index: CocoDataset, i: int, channels: int) -> ImageFacts:
    facts = ImageFacts()
    try:
        image = index.read_image(i, channels)
    except BrokenImageError as e:
        facts.broken = str(e)
        return facts
    try:
        with Image.open(index.image_path(i)) as opened:
            facts.forms = _forms(opened, channels)
    except Exception:  # Pillow raises all sorts of things, but what it does not know may well be readable
        pass
    facts.pixels = hashlib.blake2b(image.data, digest_size=16, person=f"{image.shape[1]}".encode()).digest()
    for row in range(index.offsets[i], index.offsets[i + 1]):
        if index.num_parts[row] >= 0:
            _look_at_mask(index, i, row, facts)
    return facts


def _forms(opened: Image.Image, channels: int) -> set[str]:
    forms = set()
    # Pillow would decode a PNG to see whether it has EXIF at its end.
    if opened.format != "PNG" and opened.getexif().get(_ORIENTATION, 1) not in (0, 1):
        forms.add(TURNED)
    if opened.mode in ("1", "L", "LA", "F") or opened.mode.startswith("I"):
        forms.add(GREY)
    if opened.mode == "CMYK":
        forms.add(CMYK)
    if opened.mode in ("I", "F") or ";16" in str(opened.tile):
        forms.add(DEEP)
    if opened.mode in ("LA", "PA", "RGBA", "RGBa") and channels == 3:
        forms.add(ALPHA)
    return forms


def _look_at_mask(index: CocoDataset, i: int, row: int, facts: ImageFacts) -> None:
    height, width = map(int, index.sizes[i])
    rle = index.rle(row, height, width)
    if not coco_mask.area(rle):
        facts.empty_masks.append(row)
    elif index.num_parts[row] == 0:
        x, y, w, h = coco_mask.toBbox(rle).tolist()
        around = np.array([x, y, x + w, y + h])
        if overlaps(index.boxes[row : row + 1], around[None])[0] < MISMATCH:
            facts.misfits[row] = around
