"""Writes a dataset of another format, or of another layout of COCO's format, in COCO's layout.

The readers yield images with their objects; what they yield is written as JSON and then read by the one reader of
annotations, so that a converted dataset has passed the checks of any other.
"""

import contextlib
import itertools
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from maskrcnn_jax.converting.label_images import read_label_images
from maskrcnn_jax.converting.labelme import read_labelme
from maskrcnn_jax.converting.source import Picture, Source, inside
from maskrcnn_jax.converting.voc import read_voc
from maskrcnn_jax.converting.yolo import read_yolo
from maskrcnn_jax.data.annotations import read_annotations
from maskrcnn_jax.data.coco import annotations_name
from maskrcnn_jax.data.dataset import read_dataset
from maskrcnn_jax.data.entries import NO_NAME
from maskrcnn_jax.data.file_names import use_names_on_disk
from maskrcnn_jax.data.layouts import LABELME, VOC, YOLO, Layout, describe, find_layout
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.paths import as_path, local_path
from maskrcnn_jax.writing import replacing, writing

_log = logging.getLogger(__name__)


def convert(
    source: str | os.PathLike, out: str | os.PathLike, *, copy: bool = False, class_name: str = "object"
) -> dict[str, tuple[int, int]]:
    """Write a dataset in COCO's layout.

    Args:
        source: folder of the dataset.
        out: folder to write, new or empty.
        copy: copy the images; otherwise they are symbolic links.
        class_name: of the objects in instance masks that no folder names.

    Returns:
        Split -> number of images and of annotations.

    Raises:
        UserError: the source has no known layout or is malformed, or the folder cannot be written.
    """
    root = Path(os.path.abspath(local_path(source, "a dataset to convert")))
    out = Path(os.path.abspath(local_path(out, "the folder to write")))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists already; remove it, or choose another folder")
    layout = find_layout(root)
    if layout is None:
        what = f"holds {describe(root)}, which is no known layout" if root.is_dir() else "is not a folder"
        raise UserError(
            f"{root} {what}; give a dataset in COCO's format, YOLO's, labelme's or Pascal VOC's, or images with "
            "instance masks"
        )
    _log.info("%s is in %s", source, layout.name)
    with replacing(out) as folder:
        if layout.splits:
            _restructure(layout, folder, copy)
        else:
            _write(_open(layout, class_name), folder, copy)
    return {path.stem.removeprefix("instances_"): _check(path, out) for path in sorted(out.glob("annotations/*.json"))}


@contextlib.contextmanager
def in_coco_format(source: str | os.PathLike) -> Iterator[Path]:
    """Yield the folder of a dataset, or that of a temporary conversion if it has another format than COCO's."""
    root = as_path(source)
    layout = find_layout(root) if root.is_dir() else None
    if layout is None or layout.splits:
        yield root
        return
    with tempfile.TemporaryDirectory(prefix="converted_") as folder:
        convert(root, folder)
        yield Path(folder)


def _open(layout: Layout, class_name: str) -> Source:
    readers = {YOLO: read_yolo, LABELME: read_labelme, VOC: read_voc}
    return readers[layout.name](layout.root) if layout.name in readers else read_label_images(layout.root, class_name)


def _check(path: Path, out: Path) -> tuple[int, int]:
    """Read what was written as training will."""
    dataset = read_dataset(path, out / path.stem.removeprefix("instances_"), keep_unlisted=True)
    dataset.log_problems()
    return len(dataset), len(dataset.labels)


def _restructure(layout: Layout, folder: Path, copy: bool) -> None:
    """Write another layout of COCO's format: the same annotation files, and the images that they list."""
    for split, files in layout.splits.items():
        path = folder / annotations_name(split)
        path.parent.mkdir(parents=True, exist_ok=True)
        (folder / split).mkdir(exist_ok=True)  # where all names begin with ../, no image is placed there
        dataset = read_annotations(files.json_path, files.image_dir, keep_unlisted=True)
        on_disk = use_names_on_disk(dataset).file_names.tolist()
        for name, found in dict(zip(dataset.file_names.tolist(), on_disk, strict=True)).items():
            image = inside(layout.root, files.image_dir / found, files.json_path)
            if not image.is_file():
                raise UserError(f"{files.json_path} lists {name}, which is not in {files.image_dir}; add or remove it")
            _place(image, inside(folder, folder / split / name, files.json_path), copy)
        shutil.copyfile(files.json_path, path)


def _write(source: Source, folder: Path, copy: bool) -> None:
    ids = itertools.count(1)
    for split, read in source.splits.items():
        path = folder / annotations_name(split)
        path.parent.mkdir(parents=True, exist_ok=True)
        (folder / split).mkdir(exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            for image in _entries(file, source.categories, read(), ids):
                _place(image.path, inside(folder, folder / split / image.name, path), copy)


def _entries(
    file: TextIO, categories: dict[int, str], pictures: Iterator[Picture], ids: Iterator[int]
) -> Iterator[Picture]:
    """Write an annotation file while the images are read, and yield them."""
    images: list[str] = []
    comma = ""
    file.write('{"annotations": [')
    for image_id, picture in enumerate(pictures, start=1):
        if NO_NAME.search(picture.name):  # the reader of what is written here would refuse it
            raise UserError(f"the file name {ascii(picture.name)} has a line break or is not UTF-8; rename the file")
        height, width = picture.size
        entry = {"id": image_id, "file_name": picture.name, "height": height, "width": width}
        images.append(json.dumps(entry))
        for item in picture.objects:
            mask = {} if item.segmentation is None else {"segmentation": item.segmentation}
            fields = {"id": next(ids), "image_id": image_id, "category_id": item.category, "bbox": item.box}
            file.write(f"{comma}\n{json.dumps(fields | {'area': item.area, 'iscrowd': 0} | mask)}")
            comma = ","
        yield picture
    listed = [json.dumps({"id": i, "name": name}) for i, name in sorted(categories.items())]
    file.write(f'],\n"images": [{", ".join(images)}],\n"categories": [{", ".join(listed)}]}}\n')


def _place(image: Path, path: Path, copy: bool) -> None:
    """Link an image, or copy it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if os.path.lexists(path):  # a link, through which a copy would overwrite the image
        raise UserError(f"two images would be written as {path.name}; rename one of them, {image}")
    if not copy:
        with contextlib.suppress(OSError):  # of file systems without links
            path.symlink_to(image.resolve())
            return
    try:
        content = image.read_bytes()
    except OSError as error:
        raise UserError(f"{image} cannot be read ({error.strerror}); check its permissions") from None
    with writing(path):
        path.write_bytes(content)
