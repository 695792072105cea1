"""Opens a dataset: from a folder in COCO's layout, or from the source that the options name."""

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

from maskrcnn_jax.data.annotations import read_annotations
from maskrcnn_jax.data.coco import CocoDataset, annotations_name, clip_boxes
from maskrcnn_jax.data.findings import Kind, Report, stop
from maskrcnn_jax.data.formats import correct_formats
from maskrcnn_jax.data.tfds_source import load_tfds
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.options import DataOptions
from maskrcnn_jax.paths import as_path, file_names


def load_dataset(data: DataOptions, split: str, *, keep_flat: bool = False) -> CocoDataset:
    """Open one split of a dataset.

    Args:
        data: options of the data.
        split: for example "train2017".
        keep_flat: as in ``load_coco``.

    Returns:
        The dataset; the same from every source.

    Raises:
        UserError: the dataset cannot be used.
    """
    options = {
        "contiguous_labels": data.contiguous_labels,
        "keep_unlisted": data.ignore_regions,
        "keep_flat": keep_flat,
    }
    if data.source == "coco":
        return load_coco(data.coco_dir, split, skip_broken=data.skip_broken, **options)
    return load_tfds(data.tfds_dir, split, **options)


def load_coco(
    coco_dir: str | os.PathLike,
    split: str,
    *,
    skip_broken: bool = False,
    contiguous_labels: bool = False,
    keep_unlisted: bool = False,
    keep_flat: bool = False,
) -> CocoDataset:
    """Open one split of a dataset in COCO's layout and check it.

    Boxes are clipped to their image. Annotations that cannot be used (an empty box, a box outside the image, neither
    box nor mask) are dropped; ``problems`` of the result counts them, and one warning reports them.

    Args:
        coco_dir: folder with ``<split>/`` and ``annotations/instances_<split>.json``.
        split: for example "train2017".
        skip_broken: keep images whose file is missing instead of raising; reading them raises BrokenImageError.
        contiguous_labels: number COCO's categories from 1 to 80 instead of by their ids.
        keep_unlisted: accept objects of categories that the file does not list, as crowds, instead of raising.
        keep_flat: keep annotations whose box has no area in the image. Nothing is learnt from them, but COCO's
            evaluation counts them.

    Returns:
        The dataset, images in the order of the file.

    Raises:
        UserError: the folder has another layout, the JSON is broken or contradicts itself, or image files are missing.
    """
    dataset = read_dataset(
        *locate(coco_dir, split),
        skip_broken=skip_broken,
        contiguous_labels=contiguous_labels,
        keep_unlisted=keep_unlisted,
    )
    dataset.log_problems()
    return dataset if keep_flat else dataset.without_flat()


def read_dataset(
    json_path: Path,
    image_dir: Path,
    *,
    skip_broken: bool = False,
    contiguous_labels: bool = False,
    keep_unlisted: bool = False,
    report: Report = stop,
) -> CocoDataset:
    """Read an annotation file and list a folder of images, as ``load_coco`` with ``keep_flat`` does.

    Args:
        json_path: the annotations.
        image_dir: the folder of the images.
        skip_broken: as in ``load_coco``.
        contiguous_labels: as in ``load_coco``.
        keep_unlisted: as in ``load_coco``.
        report: called with every finding; see ``read_annotations``.
    """
    dataset = read_annotations(
        json_path, image_dir, contiguous_labels=contiguous_labels, keep_unlisted=keep_unlisted, report=report
    )
    dataset = correct_formats(dataset, report)
    missing = _find_missing(dataset, report if not skip_broken else lambda finding: None)
    return clip_boxes(replace(dataset, missing=missing), report)


def locate(coco_dir: str | os.PathLike, split: str) -> tuple[Path, Path]:
    """Return the annotation file and the folder of images of a split in COCO's layout.

    Raises:
        UserError: the folder has another layout.
    """
    root = as_path(coco_dir)
    layout = f"a folder that holds {split}/ (the images) and {annotations_name(split)}"
    if not os.fspath(coco_dir):
        raise UserError(f"no dataset was given; set data.coco_dir to {layout}")
    if not root.is_dir():
        raise UserError(f"coco_dir {root} is not a folder; set data.coco_dir to {layout}")
    json_path, image_dir = root / annotations_name(split), root / split
    absent = [
        str(path) for path, found in ((json_path, json_path.is_file()), (image_dir, image_dir.is_dir())) if not found
    ]
    if absent:
        raise UserError(
            f"coco_dir {root} lacks {' and '.join(absent)}; data.coco_dir must be {layout}, or data.train_split and "
            "data.eval_split the names of the splits there"
        )
    return json_path, image_dir


def _find_missing(dataset: CocoDataset, report: Report) -> np.ndarray:
    """Return the rows of images without a file; one listing of the folder is cheaper than a look at every file."""
    image_dir, names = dataset.image_dir, dataset.file_names.tolist()
    present = file_names(image_dir)
    missing = [
        row
        for row, name in enumerate(names)
        if os.path.normpath(name) not in present and not (os.path.dirname(name) and os.path.isfile(image_dir / name))
    ]
    if missing:
        alike = find_alike(present, [names[row] for row in missing[:3]])
        such = ", ".join(f"{name} (there is {other})" if other else name for name, other in alike.items())
        places = dataset.image_places[missing]
        report(Kind.MISSING_FILE.finding(places, total=len(names), folder=image_dir, names=such))
    return np.array(missing, np.int64)


def find_alike(present: set[str], names: list[str]) -> dict[str, str | None]:
    """Find files that differ from missing ones only by the folders before their name or by case.

    Args:
        present: names of the files in a folder.
        names: of missing files.

    Returns:
        Each missing name -> the only file like it, or None.
    """
    lower = Counter(name.lower() for name in present)
    by_lower = {name.lower(): name for name in present}
    wanted = {name: name.replace("\\", "/").rpartition("/")[2].lower() for name in names}
    return {name: by_lower[key] if lower[key] == 1 else None for name, key in wanted.items()}
