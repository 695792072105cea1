"""Holds out images of the training split for evaluation, where a dataset has no split of its own for it.

The choice is seeded, keeps groups of images together, such as the frames of a video, and gives each class its share as
far as possible. It is recorded in a file, because it must stay the same when a run resumes or is evaluated.
"""

import json
import logging
import os
import re
from collections.abc import Hashable
from pathlib import Path

import numpy as np

from maskrcnn_jax.data.coco import CocoDataset
from maskrcnn_jax.data.json_stream import stream_json
from maskrcnn_jax.data.numbers import number
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.paths import as_path, read_bytes
from maskrcnn_jax.writing import write_json

_log = logging.getLogger(__name__)


def record_held_out(path: Path, dataset: CocoDataset, *, share: float, group: str, seed: int) -> None:
    """Write which images of a dataset are for training and which are held out.

    Args:
        path: file to write.
        dataset: the training split.
        share: of the images to hold out, 0..1.
        group: as ``data.val_group``.
        seed: of the choice.

    Raises:
        UserError: the images cannot be grouped so, or all are in one group.
    """
    groups = _groups(dataset, group)
    if len(np.unique(groups)) < 2:
        raise UserError(
            f"data.val_share {share} cannot hold out images of {dataset.annotation_path}: all {len(dataset)} are in "
            f"one group (data.val_group is {group!r}); group them otherwise, or add images"
        )
    held_out = choose_held_out(dataset, share, groups, seed)
    names = {part: dataset.file_names[rows].tolist() for part, rows in (("train", ~held_out), ("val", held_out))}
    write_json(path, {"share": share, "group": group, "seed": seed} | names, indent=1)
    _log.info("%d of %d images are held out for evaluation, listed in %s", held_out.sum(), len(dataset), path)


def choose_held_out(dataset: CocoDataset, share: float, groups: np.ndarray, seed: int) -> np.ndarray:
    """Choose images so that each class has about the same share of its images among them.

    Each class, the rarest first, deals its groups to the part that lacks most of it.

    Args:
        dataset: N images.
        share: of the images to choose, 0..1.
        groups: [N] int64, number of the group of each image; a group is chosen as a whole.
        seed: of the order in which groups are dealt.

    Returns:
        [N] bool; neither none nor all of the groups.

    Source: "On the Stratification of Multi-label Data", Sechidis et al., 2011.
    """
    num_labels = dataset.categories.num_classes
    pairs = np.unique(dataset.image_rows * num_labels + dataset.labels)
    images, labels = np.divmod(pairs[pairs % num_labels > 0], num_labels)
    # The label 0 stands for all images.
    images, labels = np.append(np.arange(len(dataset)), images), np.append(np.zeros(len(dataset), np.int64), labels)
    cells, counts = np.unique(groups[images] * num_labels + labels, return_counts=True)
    of_group: dict[int, list[tuple[int, int]]] = {}
    with_label: dict[int, list[int]] = {}
    for cell, count in zip(cells.tolist(), counts.tolist(), strict=True):
        number, label = divmod(cell, num_labels)
        of_group.setdefault(number, []).append((label, count))
        with_label.setdefault(label, []).append(number)
    totals = np.bincount(labels, minlength=num_labels).astype(float)
    lacking = [(totals * part).tolist() for part in (1 - share, share)]
    # Large groups first, while there is room for them in both parts.
    order = np.random.default_rng(seed).permutation(len(of_group))
    numbers = sorted(of_group, key=lambda number: (-of_group[number][0][1], order[number]))
    rank = {number: i for i, number in enumerate(numbers)}
    chosen: dict[int, bool] = {}
    for label in sorted(with_label, key=lambda label: (label == 0, len(with_label[label]), label)):
        for number in sorted(with_label[label], key=rank.__getitem__):
            if number in chosen:
                continue
            chosen[number] = (lacking[1][label], lacking[1][0]) > (lacking[0][label], lacking[0][0])
            for of_label, count in of_group[number]:
                lacking[chosen[number]][of_label] -= count
    if len(set(chosen.values())) == 1:  # too few to deal; the smallest goes to the empty part
        chosen[numbers[-1]] = not chosen[numbers[-1]]
    return np.array([chosen[number] for number in groups.tolist()])


def take_part(dataset: CocoDataset, path: str | os.PathLike, *, held_out: bool) -> CocoDataset:
    """Return a part of a training split.

    Args:
        dataset: the whole split.
        path: what ``record_held_out`` wrote. Images that it does not name are for training.
        held_out: take the images that were held out, not those for training.

    Raises:
        UserError: the file cannot be read, or names none of the images.
    """
    try:
        parts = json.loads(read_bytes(as_path(path)).decode())
        train, val = ([str(name) for name in parts[part]] for part in ("train", "val"))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(
            f"{path} does not say which images are held out; it must be a JSON file with lists of file names, train "
            "and val, as a training with data.val_share writes it"
        ) from None
    is_held_out = np.isin(dataset.file_names, val)
    rows = np.flatnonzero(is_held_out == held_out)
    if not len(rows) or not is_held_out.any():
        raise UserError(
            f"{path} holds out {is_held_out.sum()} of the {len(dataset)} images of {dataset.annotation_path}; use the "
            "dataset that it was made for, or name a split of this one, such as --split=val"
        )
    unknown = int((~is_held_out & ~np.isin(dataset.file_names, train)).sum())
    if unknown and not held_out:
        _log.warning("%d images are not in %s and are used for training", unknown, path)
    return dataset.take_images(rows)


def _groups(dataset: CocoDataset, group: str) -> np.ndarray:
    """Return the number of the group of each image, [N] int64."""
    names = dataset.file_names.tolist()
    keys: list[Hashable]
    if not group:
        return np.arange(len(dataset))
    if group == "folder":
        keys = [os.path.dirname(name) for name in names]
    elif "(" in group:
        keys = _matches(names, group)
    else:
        keys = _fields(dataset, group)
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], np.int64)


def _matches(names: list[str], expression: str) -> list[Hashable]:
    try:
        found = [re.search(expression, name) for name in names]
        keys: list[Hashable] = [match[1] if match else ("", name) for match, name in zip(found, names, strict=True)]
    except (re.error, IndexError) as error:
        raise UserError(f"data.val_group {expression!r} is not a regular expression with a group: {error}") from None
    if not any(found):
        raise UserError(f"data.val_group {expression!r} is found in no file name, such as {names[0]}; correct it")
    return keys


def _fields(dataset: CocoDataset, field: str) -> list[Hashable]:
    """Return the values of a field of the entries of "images"; an image without it is a group of its own."""
    values: list[Hashable] = []

    def keep(entry: object) -> None:
        value = entry.get(field) if isinstance(entry, dict) else None
        values.append(("", len(values)) if value is None else json.dumps(number(value), sort_keys=True))

    stream_json(dataset.annotation_path, {"images": keep}, skip=["annotations"])
    if all(isinstance(value, tuple) for value in values):
        raise UserError(
            f"data.val_group is {field!r}, but no image in {dataset.annotation_path} has such a field; use folder, a "
            "field such as video_id, or a regular expression such as '(.*)_[0-9]+'"
        )
    return [values[place] for place in dataset.image_places.tolist()]
