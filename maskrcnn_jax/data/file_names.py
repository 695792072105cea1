"""Finds image files whose names are written in another form than in the annotations."""

import os
import re
import unicodedata
from collections import defaultdict
from dataclasses import replace
from urllib.parse import unquote

import numpy as np

from maskrcnn_jax.data.coco import CocoDataset
from maskrcnn_jax.data.findings import Kind

_HAS_OTHER_FORMS = re.compile(r"[^A-Za-z0-9_./-]")


def use_names_on_disk(dataset: CocoDataset) -> CocoDataset:
    """Replace file names that no file has by those of the files that are meant.

    macOS decomposes accents, so that "é" of an annotation tool may be "e" and an accent on disk, or the other way
    round. Tools that export URLs write "%20" for a space, and Windows a backslash
    between folders. Names are left alone where several files would match.

    Args:
        dataset: as it was read.

    Returns:
        The dataset, with a warning about the names that were replaced among its problems.
    """
    names = dataset.file_names.tolist()
    absent = [
        row
        for row, name in enumerate(names)
        if _HAS_OTHER_FORMS.search(name) and not os.path.isfile(dataset.image_dir / name)
    ]
    if not absent:
        return dataset
    files = defaultdict(list)
    for folder, _, found in os.walk(dataset.image_dir):
        for name in found:
            relative = os.path.relpath(os.path.join(folder, name), dataset.image_dir)
            # Where the locale is not UTF-8, Python gives bytes that it cannot decode as surrogates.
            files[plain_name(os.fsencode(relative).decode(errors="surrogateescape"))].append(relative)
    replaced = [row for row in absent if len(files.get(plain_name(names[row]), ())) == 1]
    if not replaced:
        return dataset
    for row in replaced:
        (names[row],) = files[plain_name(names[row])]
    places = {Kind.OTHER_FORM: dataset.image_places[replaced]}
    return replace(dataset, file_names=np.array(names, np.str_), problem_places=dataset.problem_places | places)


def plain_name(name: str) -> str:
    """Return the form in which names are compared: accents composed, no character as %20, and / between folders."""
    return unicodedata.normalize("NFC", unquote(name)).replace("\\", "/")
