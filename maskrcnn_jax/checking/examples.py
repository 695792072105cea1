"""Findings with a few examples by name: from an index, or from what the annotation file says."""

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from maskrcnn_jax.data.coco import CocoDataset
from maskrcnn_jax.data.entries import short
from maskrcnn_jax.data.findings import ANNOTATIONS, IMAGES, Finding, Kind
from maskrcnn_jax.data.json_stream import stream_json
from maskrcnn_jax.data.numbers import number
from maskrcnn_jax.errors import UserError

NUM_EXAMPLES = 3  # of each finding

_RAW_LIST = msgspec.json.Decoder(list[msgspec.Raw])


def images_finding(index: CocoDataset, kind: Kind, rows: np.ndarray, **details: Any) -> list[Finding]:
    """Return a finding about images, or none if there are no rows.

    Args:
        index: of the split.
        kind: of the finding.
        rows: of the images in the index.
        **details: the values that the sentence names.
    """
    examples = [str(index.file_names[row]) for row in rows[:NUM_EXAMPLES]]
    return [kind.finding(rows, examples=examples, **details)] if len(rows) else []


def annotations_finding(
    index: CocoDataset,
    kind: Kind,
    rows: np.ndarray,
    describe: Callable[[int], str] = lambda row: "",
    **details: Any,
) -> list[Finding]:
    """Return a finding about annotations, or none if there are no rows.

    Args:
        index: of the split.
        kind: of the finding.
        rows: of the annotations in the index.
        describe: returns what to add to the name of an example.
        **details: the values that the sentence names.
    """
    images = np.searchsorted(index.offsets, rows[:NUM_EXAMPLES], side="right") - 1
    examples = [
        f"{index.file_names[image]}, annotation {index.annotation_ids[row]}{describe(row)}"
        for image, row in zip(images, rows[:NUM_EXAMPLES].tolist(), strict=True)
    ]
    return [kind.finding(rows, examples=examples, **details)] if len(rows) else []


def listed(names: Sequence[str]) -> str:
    """Return the first ten names."""
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")


def name_examples(json_path: Path, findings: list[Finding]) -> list[Finding]:
    """Add examples to the findings that have rows but no examples, by what the annotation file says there."""
    bare = [f for f in findings if f.section in (IMAGES, ANNOTATIONS) and len(f.rows) and not f.examples]
    if not bare:
        return findings
    wanted: dict[str, set[int]] = {IMAGES: set(), ANNOTATIONS: set()}
    for finding in bare:
        wanted[finding.section] |= set(finding.rows[:NUM_EXAMPLES].tolist())
    try:
        entries = read_entries(json_path, wanted)
        image_ids = [entry.get("image_id") for entry in entries[ANNOTATIONS].values() if isinstance(entry, dict)]
        names = _image_names(json_path, image_ids)
    except UserError:  # the file is cut short, which is one of the findings
        return findings

    def example(section: str, place: int) -> str:
        entry = entries[section].get(place)
        if not isinstance(entry, dict):
            return f"entry {place} of {section}"
        if section == IMAGES:
            return short(entry.get("file_name", f"image {short(entry.get('id'))}"))
        image = short(number(entry.get("image_id")))
        box = f", bbox {short(str(entry['bbox']))}" if _is_box(entry.get("bbox")) else ""
        return f"{short(names.get(image, f'image {image}'))}, annotation {short(entry.get('id'))}{box}"

    return [
        replace(f, examples=[example(f.section, place) for place in f.rows[:NUM_EXAMPLES].tolist()])
        if f in bare
        else f
        for f in findings
    ]


def read_entries(json_path: Path, wanted: dict[str, set[int]]) -> dict[str, dict[int, object]]:
    """Return some elements of lists of an annotation file as they are.

    Args:
        json_path: the file.
        wanted: name of a list -> places in it.

    Returns:
        Name of the list -> place -> element.
    """
    found: dict[str, dict[int, object]] = {section: {} for section in wanted}
    seen = dict.fromkeys(wanted, 0)

    def keep(section: str, entry: object) -> None:
        if seen[section] in wanted[section]:
            found[section][seen[section]] = entry
        seen[section] += 1

    def keep_batch(section: str, text: bytes) -> bool:
        try:
            entries = _RAW_LIST.decode(text)
            places = wanted[section] & set(range(seen[section], seen[section] + len(entries)))
            found[section] |= {place: json.loads(bytes(entries[place - seen[section]])) for place in places}
        except (ValueError, RecursionError):
            return False
        seen[section] += len(entries)
        return True

    needed = [section for section, places in wanted.items() if places]
    if not needed:
        return found
    stream_json(
        json_path,
        {section: functools.partial(keep, section) for section in needed},
        {section: functools.partial(keep_batch, section) for section in needed},
        skip={IMAGES, ANNOTATIONS}.difference(needed),
    )
    return found


def _image_names(json_path: Path, image_ids: list) -> dict[str, str]:
    """Return the file names of images by their id as text, because malformed entries may have ids of any type."""
    wanted = {short(number(image_id)) for image_id in image_ids}
    names: dict[str, str] = {}

    def keep(entry: object) -> None:
        if isinstance(entry, dict) and (image_id := short(number(entry.get("id")))) in wanted:
            names.setdefault(image_id, entry.get("file_name", ""))

    stream_json(json_path, {IMAGES: keep}, skip=[ANNOTATIONS])
    return names


def _is_box(box: object) -> bool:
    return isinstance(box, list) and len(box) == 4 and all(isinstance(v, int | float | str) for v in box)
