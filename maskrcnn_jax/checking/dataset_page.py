"""A dataset check as one HTML page: findings with pictures of examples, and all images to look through."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from maskrcnn_jax import page
from maskrcnn_jax.checking.annotations import objects_per_category
from maskrcnn_jax.checking.dataset import Split
from maskrcnn_jax.checking.dataset_images import images_data, read_picture
from maskrcnn_jax.checking.examples import NUM_EXAMPLES, read_entries
from maskrcnn_jax.data.coco import CocoDataset
from maskrcnn_jax.data.entries import short
from maskrcnn_jax.data.findings import ANNOTATIONS, IMAGES, Finding
from maskrcnn_jax.data.transforms import shrink_mask
from maskrcnn_jax.inference.draw import draw_instances, shrink

_SIDE = 340  # pixels of a picture's longer side; three fit beside each other


def write_report(path: Path, splits: Sequence[Split]) -> None:
    """Write the page.

    Args:
        path: the file; its folder is made if it does not exist.
        splits: the checked splits.

    Raises:
        UserError: if the file cannot be written.
    """
    data = images_data(splits, path)
    colours = {entry["name"]: i for i, entry in enumerate(data["classes"])}
    page.write_page(
        path,
        page.TEMPLATES / "dataset.html.j2",
        title="Dataset check",
        summary=summary(splits),
        counts=[_counts(split) for split in splits],
        splits=[_split(split, colours) for split in splits],
        num_shown=len(data["images"]["names"]),
        num_images=data["total"],
        classes=[printable(entry["name"]) for entry in data["classes"]],
        shown_splits=data["splits"],
        data=page.embed(data),
    )


def summary(splits: Sequence[Split]) -> str:
    """Return a sentence with the number of errors and warnings."""
    errors = sum(split.num_errors for split in splits)
    warnings = sum(len(split.findings) for split in splits) - errors
    return f"{_number(errors, 'error')} and {_number(warnings, 'warning')} in {_number(len(splits), 'split')}."


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _counts(split: Split) -> list:
    """Return the row of a split: its name and how much it holds."""
    counts = [0] * 6
    if split.data:
        index = split.data
        objects = ~index.crowd
        counts = [
            len(index),
            int((index.num_objects == 0).sum()),
            int(objects.sum()),
            int(index.crowd.sum()),
            int((objects & index.has_mask).sum()),
            len(index.categories.names),
        ]
    return [split.name, *counts, split.num_errors, len(split.findings) - split.num_errors]


def _split(split: Split, colours: dict[str, int]) -> dict:
    counts = objects_per_category(split.data) if split.data else {}
    shown: dict[str, set[int]] = {IMAGES: set(), ANNOTATIONS: set()}
    for finding in split.findings:
        if finding.section in shown:
            shown[finding.section] |= set(finding.rows[:NUM_EXAMPLES].tolist())
    entries = read_entries(split.json_path, shown) if split.data else {}
    return {
        "name": split.name,
        "path": printable(str(split.json_path)),
        "findings": [_finding(split, finding, entries, colours) for finding in split.findings],
        "categories": [[printable(name), count] for name, count in counts.items()],
    }


def _finding(split: Split, finding: Finding, entries: dict[str, dict[int, object]], colours: dict[str, int]) -> dict:
    return {
        "is_error": finding.is_error,
        "kind": finding.kind,
        "sentence": printable(finding.sentence),
        "num_entries": len(finding.rows),
        "examples": [printable(example) for example in finding.examples],
        "pictures": list(_pictures(split, finding, entries, colours)),
    }


def _pictures(
    split: Split, finding: Finding, entries: dict[str, dict[int, object]], colours: dict[str, int]
) -> Iterator[tuple[str, str]]:
    """Yield the source and the caption of a picture of each example that can be shown.

    Args:
        split: checked.
        finding: one of it.
        entries: of the annotation file, by their list and place.
        colours: by class.
    """
    index = split.data
    if index is None or finding.section not in entries:
        return
    for place, example in zip(finding.rows[:NUM_EXAMPLES].tolist(), finding.examples, strict=False):
        entry = entries[finding.section].get(place)
        if not isinstance(entry, dict):
            continue
        image_id = entry.get("id" if finding.section == IMAGES else "image_id")
        if not isinstance(image_id, int):
            continue
        rows = np.flatnonzero(index.image_ids == image_id)
        if len(rows):
            drawn = place if finding.section == ANNOTATIONS else None
            picture = _draw(index, int(rows[0]), drawn, entry, colours)
            if picture is not None:
                yield page.image_source(picture), printable(example)


def _draw(
    index: CocoDataset, image: int, place: int | None, entry: dict, colours: dict[str, int]
) -> np.ndarray | None:
    """Draw the annotation at a place of the file, or all of an image; None if the image cannot be shown."""
    pixels = read_picture(index.image_path(image))
    if pixels is None:
        return None
    rows = np.arange(index.offsets[image], index.offsets[image + 1])
    if place is not None:
        rows = rows[index.places[rows] == place]
    scale = min(1, _SIDE / max(pixels.shape[:2]))
    small = shrink(pixels, _SIDE)
    boxes, names, masks = index.boxes[rows], [f"annotation {index.annotation_ids[row]}" for row in rows], None
    categories = [_category(index, row) for row in rows.tolist()]
    if place is None:
        names = categories
    elif not len(rows):  # the annotation was dropped or is malformed; its box may show why
        boxes = _box_as_given(entry)
        names = [f"annotation {short(entry.get('id'))}"][: len(boxes)]
        categories = [""] * len(boxes)
    if pixels.shape[:2] == tuple(index.sizes[image].tolist()) and len(rows) and index.has_mask[rows].all():
        size = pixels.shape[:2]
        masks = [shrink_mask(index.crop(row, *size), size, small.shape[:2]) for row in rows.tolist()]
    boxes = np.clip(boxes * scale, -1, max(small.shape[:2]) + 1)
    names, places = [printable(name) for name in names], [colours.get(name, len(colours)) for name in categories]
    return draw_instances(small, boxes, names, masks=masks, min_side=_SIDE, colours=places)


def _category(index: CocoDataset, row: int) -> str:
    return index.categories.name(index.labels[row]) if index.labels[row] else "not listed"


def _box_as_given(entry: dict) -> np.ndarray:
    """Return x1, y1, x2, y2 [1, 4] of an entry, [0, 4] if it has no box of four finite numbers."""
    try:
        x, y, width, height = np.array(entry["bbox"], np.float64)
        box = np.array([[x, y, x + width, y + height]])
    except (KeyError, TypeError, ValueError, OverflowError):
        return np.zeros((0, 4))
    return box if np.isfinite(box).all() else np.zeros((0, 4))


def printable(text: str) -> str:
    """Escape characters that move the cursor of a terminal or cannot be encoded; file names may hold them."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
