"""Opens a dataset: from a folder in COCO's layout, or from the source that the options name."""

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

from maskrcnn_jax.data.annotations import read_annotations
from maskrcnn_jax.data.areas import drop_impossible_areas
from maskrcnn_jax.data.coco import CocoDataset, annotations_name, clip_boxes, exclude_categories
from maskrcnn_jax.data.file_names import use_names_on_disk
from maskrcnn_jax.data.findings import Kind, Report, stop
from maskrcnn_jax.data.formats import correct_formats
from maskrcnn_jax.data.tfds_source import load_tfds
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.options import DataOptions

_NUM_NAMED = 6  # files, and folders, of a dataset in another layout


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
    dataset: CocoDataset
    if data.source == "coco":
        dataset = load_coco(data.coco_dir, split, skip_broken=data.skip_broken, **options)
    else:
        dataset = load_tfds(data.tfds_dir, split, **options)
    return without_excluded(dataset, data)


def without_excluded(dataset: CocoDataset, data: DataOptions) -> CocoDataset:
    """Return a dataset without the categories that the options leave out."""
    if not data.exclude_categories:
        return dataset
    how = {"ignore": data.ignore_regions, "contiguous_labels": data.contiguous_labels}
    return exclude_categories(dataset, data.exclude_categories, **how)


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
    dataset = drop_impossible_areas(use_names_on_disk(correct_formats(dataset, report)))
    missing = _find_missing(dataset, report if not skip_broken else lambda finding: None)
    return clip_boxes(replace(dataset, missing=missing), report)


def locate(coco_dir: str | os.PathLike, split: str) -> tuple[Path, Path]:
    """Return the annotation file and the folder of images of a split in COCO's layout.

    Raises:
        UserError: the folder has another layout.
    """
    root = Path(coco_dir)
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
            f"coco_dir {root} lacks {' and '.join(absent)}; there {_describe_layout(root)}. data.coco_dir must be "
            f"{layout}, or data.train_split and data.eval_split the names of the splits there"
        )
    return json_path, image_dir


def _describe_layout(root: Path) -> str:
    """Say what a folder holds that lacks a split."""
    pattern = annotations_name("*")
    splits = sorted(path.stem.removeprefix("instances_") for path in root.glob(pattern))
    if splits:
        return f"are the splits {', '.join(splits[:_NUM_NAMED])}"
    files = sorted(path for name in ("*.json", "*/*.json", "*.y*ml") for path in root.glob(name))
    folders = sorted(path for path in root.iterdir() if path.is_dir())
    names = [path.relative_to(root).as_posix() for path in files[:_NUM_NAMED]]
    names += [f"{path.name}/" for path in folders[:_NUM_NAMED]]
    return f"is {', '.join(names)}" if names else "is neither a folder nor a JSON file"


def _find_missing(dataset: CocoDataset, report: Report) -> np.ndarray:
    """Return the rows of images without a file; one listing of the folder is cheaper than a look at every file."""
    image_dir, file_names = dataset.image_dir, dataset.file_names.tolist()
    with os.scandir(image_dir) as entries:
        present = {entry.name for entry in entries if entry.is_file()}
    missing = [
        row
        for row, name in enumerate(file_names)
        if name not in present and not (os.path.dirname(name) and os.path.isfile(image_dir / name))
    ]
    if missing:
        alike = find_alike(present, [file_names[row] for row in missing[:3]])
        such = ", ".join(f"{name} (there is {other})" if other else name for name, other in alike.items())
        places = dataset.image_places[missing]
        report(Kind.MISSING_FILE.finding(places, total=len(file_names), folder=image_dir, names=such))
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
