"""Opens a dataset: from a folder in COCO's layout, or from the source that the options name."""

import functools
import logging
import os
import shlex
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
from maskrcnn_jax.data.held_out import take_part
from maskrcnn_jax.data.layouts import Files, Layout, describe, find_layout, match_split
from maskrcnn_jax.data.tfds_source import load_tfds
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.options import DataOptions
from maskrcnn_jax.paths import as_path, file_names

_log = logging.getLogger(__name__)


def load_dataset(data: DataOptions, split: str, *, keep_flat: bool = False) -> CocoDataset:
    """Open one split of a dataset.

    Args:
        data: options of the data.
        split: for example "train2017".
        keep_flat: as in ``load_coco``.

    Returns:
        The dataset; the same from every source. If ``data.split_file`` holds out images of the training split, these
        are the split for evaluation, and the others the one for training.

    Raises:
        UserError: the dataset cannot be used.
    """
    if data.val_share and not data.split_file:
        raise UserError(
            f"data.val_share is {data.val_share}, but not which images are held out; give the workdir of the "
            "training, or set data.split_file to its split.json"
        )
    in_parts = bool(data.split_file) and split in (data.train_split, data.eval_split)
    held_out = in_parts and split != data.train_split
    dataset = load_whole(data, data.train_split if held_out else split, keep_flat=keep_flat)
    return take_part(dataset, data.split_file, held_out=held_out) if in_parts else dataset


def load_whole(data: DataOptions, split: str, *, keep_flat: bool = False) -> CocoDataset:
    """Open one split of a dataset as ``load_dataset`` does, with the images that are held out."""
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
    """Open one split of a dataset in COCO's format and check it.

    Boxes are clipped to their image. Annotations that cannot be used (an empty box, a box outside the image, neither
    box nor mask) are dropped; ``problems`` of the result counts them, and one warning reports them.

    Args:
        coco_dir: folder as for ``locate``.
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


def locate(coco_dir: str | os.PathLike, split: str) -> Files:
    """Find the annotation file and the folder of images of a split, and log in which layout they lie.

    Args:
        coco_dir: folder in one of the layouts of COCO's format.
        split: name of the split. Where a standard name such as "val2017" is absent, the split of that role is found.

    Raises:
        UserError: the folder has another layout, or not this split.
    """
    wanted = f"a folder that holds {split}/ (the images) and {annotations_name(split)}, or an export in COCO's format"
    if not os.fspath(coco_dir):
        raise UserError(f"no dataset was given; set data.coco_dir to {wanted}")
    layout = _require_layout(as_path(coco_dir), wanted)
    name = match_split(split, list(layout.splits))
    if name is None:
        names = ", ".join(layout.splits)
        raise UserError(
            f"coco_dir {coco_dir} has no split {split}, but {names}; set data.train_split and data.eval_split to "
            "names of these, or hold out a share of the training images with data.val_share=0.2"
        )
    files = layout.splits[name]
    if not files.image_dir.is_dir():
        raise UserError(f"coco_dir {coco_dir} lacks {files.image_dir} with the images of {files.json_path}; add them")
    paths = [path.relative_to(layout.root) for path in files]
    _say(f"{coco_dir} is in {layout.name}: {paths[0]} with images in {paths[1]}, read as {split}")
    return files


@functools.cache
def _say(line: str) -> None:
    """Log a line once, however often a split is opened."""
    _log.info("%s", line)


def _require_layout(root: Path, wanted: str) -> Layout:
    """Return the layout of a folder in COCO's format; raise a UserError for another one."""
    if not root.is_dir():
        raise UserError(f"coco_dir {root} is not a folder; set data.coco_dir to {wanted}")
    layout = find_layout(root)
    if layout is None:
        raise UserError(f"coco_dir {root} holds {describe(root)}, which is no known layout; it must be {wanted}")
    if not layout.splits:
        source = shlex.quote(str(root))
        raise UserError(
            f"coco_dir {root} is in {layout.name}, which has to be converted: run maskrcnn-jax convert {source} OUT "
            "and set data.coco_dir=OUT"
        )
    return layout


def _find_missing(dataset: CocoDataset, report: Report) -> np.ndarray:
    """Return the rows of images without a file; one listing of the folder is cheaper than a look at every file."""
    image_dir, names = dataset.image_dir, dataset.file_names.tolist()
    present = file_names(image_dir)
    missing = [
        row
        for row, name in enumerate(names)
        if name not in present
        and os.path.normpath(name) not in present
        and not (os.path.dirname(name) and os.path.isfile(image_dir / name))
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
