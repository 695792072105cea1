"""The findings of the checker as one HTML page, with pictures of examples."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from maskrcnn_jax import page
from maskrcnn_jax.checking import annotations as check_annotations
from maskrcnn_jax.checking.annotations import Finding
from maskrcnn_jax.checking.dataset import Split, read_entries
from maskrcnn_jax.data.annotation_file import short
from maskrcnn_jax.data.images import decode_image
from maskrcnn_jax.inference.draw import draw_instances
from maskrcnn_jax.writing import replace_file

_SIDE = 340  # pixels of a picture's longer side: three stand side by side
_MOST_PIXELS = 1 << 26  # of an image that is opened only to be shown


def write_report(path: Path, splits: Sequence[Split]) -> None:
    """Write the page.

    Args:
      path: the file.
      splits: as they were checked.

    Raises:
      UserError: the file cannot be written.
    """
    sections = [page.paragraph(summary(splits)), page.table(*_counts(splits))]
    for split in splits:
        sections += _split(split)
    content = page.page("Check of a dataset", sections)
    replace_file(path, content.encode(errors="backslashreplace"))  # names from JSON can hold lone surrogates


def summary(splits: Sequence[Split]) -> str:
    """Say in a sentence how many errors and warnings there are."""
    errors = sum(split.num_errors for split in splits)
    warnings = sum(len(split.findings) for split in splits) - errors
    return f"{_number(errors, 'error')} and {_number(warnings, 'warning')} in {_number(len(splits), 'split')}."


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _counts(splits: Sequence[Split]) -> tuple[list[str], list[list]]:
    header = [
        "split",
        "images",
        "without objects",
        "objects",
        "crowds",
        "with masks",
        "categories",
        "errors",
        "warnings",
    ]
    rows = []
    for split in splits:
        numbers = [0] * 6
        if split.data:
            index = split.data.index
            objects = ~index.crowd
            numbers = [
                len(index),
                int((index.num_objects == 0).sum()),
                int(objects.sum()),
                int(index.crowd.sum()),
                int((objects & index.has_mask).sum()),
                len(index.categories.names),
            ]
        rows.append([split.name, *numbers, split.num_errors, len(split.findings) - split.num_errors])
    return header, rows


def _split(split: Split) -> Iterator[str]:
    yield page.heading(f"{split.name}: {split.json_path}")
    if not split.findings:
        yield page.paragraph("Nothing was found.")
    else:
        rows = [
            ["error" if f.is_error else "warning", f.kind, plain(f.sentence), len(f.rows) or ""]
            for f in split.findings
        ]
        yield page.table(["", "what", "in words", "entries"], rows)
    for finding in split.findings:
        yield from _finding(split, finding)
    if split.data:
        counts = check_annotations.objects_per_category(split.data.index)
        yield page.heading(f"{split.name}: objects of each category")
        yield page.table(["category", "objects"], [[plain(name), count] for name, count in counts.items()])


def _finding(split: Split, finding: Finding) -> Iterator[str]:
    pictures = list(_pictures(split, finding))
    if not pictures and not finding.examples:
        return
    yield page.heading(f"{'Error' if finding.is_error else 'Warning'}: {finding.kind}")
    yield page.paragraph(plain(finding.sentence))
    if len(pictures) < len(finding.examples):
        yield page.paragraph("Such as " + plain("; ".join(finding.examples)))
    yield f'<div style="display: grid; grid-template-columns: repeat(3, 1fr); gap: 1em">{"".join(pictures)}</div>'


def _pictures(split: Split, finding: Finding) -> Iterator[str]:
    places = finding.rows[: check_annotations.NUM_EXAMPLES].tolist()
    if split.data is None or finding.section not in ("images", "annotations"):
        return
    entries = read_entries(split.json_path, {finding.section: set(places)})[finding.section]
    for place, example in zip(places, finding.examples, strict=False):
        entry = entries.get(place)
        if not isinstance(entry, dict):
            continue
        image_id = entry.get("id" if finding.section == "images" else "image_id")
        rows = np.flatnonzero(split.data.file.image_ids == image_id) if isinstance(image_id, int) else ()
        if len(rows):
            picture = _draw(split, int(rows[0]), place if finding.section == "annotations" else None, entry)
            if picture is not None:
                yield page.picture(picture, plain(example))


def _draw(split: Split, image: int, place: int | None, entry: dict) -> np.ndarray | None:
    """Draws the annotation at a place of the file, or all of an image; None where the image cannot be shown."""
    index = split.data.index
    pixels = _read(index.image_path(image))
    if pixels is None:
        return None
    rows = np.arange(index.offsets[image], index.offsets[image + 1])
    if place is not None:
        rows = rows[split.data.file.places[split.data.rows[rows]] == place]
    scale = min(1, _SIDE / max(pixels.shape[:2]))
    small = cv2.resize(pixels, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA) if scale < 1 else pixels
    boxes, names, masks = index.boxes[rows], [f"annotation {index.annotation_ids[row]}" for row in rows], None
    if place is None:
        names = [_category(split, row) for row in rows]
    elif not len(rows):  # it was dropped or is malformed, and its box may show why
        boxes = _box_as_given(entry)
        names = [f"annotation {short(entry.get('id'))}"][: len(boxes)]
    if pixels.shape[:2] == tuple(index.sizes[image].tolist()) and len(rows) and index.has_mask[rows].all():
        masks = [_mask(split, row, pixels.shape[:2], small.shape[:2]) for row in rows]
    boxes = np.clip(boxes * scale, -1, max(small.shape[:2]) + 1)
    return draw_instances(small, boxes, [plain(name) for name in names], masks=masks, min_side=_SIDE)


def _category(split: Split, row: int) -> str:
    index = split.data.index
    return index.categories.name(index.labels[row]) if index.labels[row] else "not listed"


def _mask(split: Split, row: int, size: tuple[int, int], drawn: tuple[int, int]) -> np.ndarray:
    mask = np.zeros(size, np.uint8)
    part = coco_mask.decode(split.data.index.rle(row, *size))  # of the image's upper left corner
    mask[: part.shape[0], : part.shape[1]] = part
    return cv2.resize(mask, drawn[::-1], interpolation=cv2.INTER_NEAREST).astype(bool)


def _box_as_given(entry: dict) -> np.ndarray:
    """Returns x1, y1, x2, y2 [1, 4] of an entry, [0, 4] where it has no box of four finite numbers."""
    try:
        x, y, width, height = np.array(entry["bbox"], np.float64)
        box = np.array([[x, y, x + width, y + height]])
    except (KeyError, TypeError, ValueError, OverflowError):
        return np.zeros((0, 4))
    return box if np.isfinite(box).all() else np.zeros((0, 4))


def _read(path: Path) -> np.ndarray | None:
    """Reads an image as far as it can be shown."""
    try:
        with Image.open(path) as opened:
            if opened.width * opened.height > _MOST_PIXELS:
                return None
        return decode_image(path.read_bytes())
    except Exception:  # Pillow raises all sorts of things at broken files
        return None


def plain(text: str) -> str:
    """Escape what file names and the like may hold to move the cursor, or cannot be encoded."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
