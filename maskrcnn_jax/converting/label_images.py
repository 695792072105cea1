"""Reads images with instance masks that are images, as sets of cell nuclei have them.

Masks lie in a folder beside that of the images (images/1.png, masks/1.png), below it with a folder for each class
(masks/nucleus/1.png), beside the image with an ending (1.png, 1_masks.png), or in a folder for each image with a
picture for each object (1/images/1.png, 1/masks/*.png).
"""

import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import cv2
import numpy as np

from maskrcnn_jax.converting.label_map import read_label_map, regions
from maskrcnn_jax.converting.source import Object, Picture, Source, common_folder, image_size
from maskrcnn_jax.data.layouts import (
    IMAGE_FOLDERS,
    MASK_ENDINGS,
    MASK_FOLDERS,
    describe,
    folders_in,
    image_files,
    mask_folder,
)
from maskrcnn_jax.errors import UserError

_log = logging.getLogger(__name__)

_BEGINNINGS = ("image_", "img_", "mask_", "masks_", "label_", "labels_")
_ENDINGS = ("_img", "_image", *MASK_ENDINGS)

_Masks = list[tuple[str, Path]]  # name of the class, and the file; "" where no folder names the class


def read_label_images(root: Path, class_name: str) -> Source:
    """Open a folder of images and instance masks, or of folders train, val and test of them.

    Args:
        root: the folder; an absolute path.
        class_name: of the objects in masks that no folder names.

    Raises:
        UserError: there are no pairs, an image lacks its mask, or, when a split is read, a mask is malformed.
    """
    splits = {name: pairs for name, pairs in _splits(root).items() if pairs}
    if not splits:
        raise UserError(
            f"{root} holds {describe(root)}, but no images/ and masks/ with files of the same names, nor images with "
            "masks that end in _masks; rename them so"
        )
    classes = {name or class_name for pairs in splits.values() for _, masks in pairs for name, _ in masks}
    ids = {name: i for i, name in enumerate(sorted(classes), start=1)}
    named = {"": ids.get(class_name, 0)} | ids
    return Source(
        {i: name for name, i in ids.items()},
        {name: partial(_pictures, root, pairs, named) for name, pairs in splits.items()},
    )


def _splits(root: Path) -> dict[str, list[tuple[Path, _Masks]]]:
    """Return the images of each split with their masks."""
    images = next((root / name for name in IMAGE_FOLDERS if (root / name).is_dir()), None)
    masks = mask_folder(root)
    if images and masks:
        if image_files(images) or not folders_in(images):
            return {"train": _in_two_folders(images, masks)}
        return {part.name: _in_two_folders(part, masks / part.name) for part in folders_in(images)}
    pairs = _beside(root) or _one_folder_each(root)
    if pairs:
        return {"train": pairs}
    return {part.name: pairs for part in folders_in(root) for pairs in _splits_of(part)}


def _splits_of(part: Path) -> list[list[tuple[Path, _Masks]]]:
    """Return the pairs in the folder of a split."""
    images, masks = next((part / name for name in IMAGE_FOLDERS if (part / name).is_dir()), None), mask_folder(part)
    if images and masks:
        return [_in_two_folders(images, masks)]
    return [_beside(part) or _one_folder_each(part)]


def _in_two_folders(images: Path, masks: Path) -> list[tuple[Path, _Masks]]:
    by_class = {"": _by_stem(image_files(masks))}
    by_class |= {folder.name: _by_stem(image_files(folder)) for folder in folders_in(masks)}
    pairs = []
    for image in image_files(images):
        stem = _shared(image)
        found = [(name, files[stem]) for name, files in by_class.items() if stem in files]
        if not found:
            raise UserError(f"{image} has no mask of its name in {masks}; add it, or remove the image")
        pairs.append((image, found))
    return pairs


def _by_stem(paths: list[Path]) -> dict[str, Path]:
    return {_shared(path): path for path in paths}


def _beside(folder: Path) -> list[tuple[Path, _Masks]]:
    """Return images beside which lie masks with an ending; others are left out, as what else tools draw is one."""
    files = image_files(folder)
    masks = _by_stem([path for path in files if path.stem.endswith(MASK_ENDINGS)])
    images = [path for path in files if not path.stem.endswith(MASK_ENDINGS)]
    stems = [_shared(path) for path in images]
    return [(path, [("", masks[stem])]) for path, stem in zip(images, stems, strict=True) if stem in masks]


def _one_folder_each(root: Path) -> list[tuple[Path, _Masks]]:
    """Return the images of folders that hold one each, with a mask for each object."""
    pairs: list[tuple[Path, _Masks]] = []
    absent = []
    for folder in folders_in(root):
        images = next((image_files(folder / name) for name in IMAGE_FOLDERS if (folder / name).is_dir()), [])
        if len(images) != 1 or images[0].stem != folder.name:
            return []
        masks = next((folder / name for name in MASK_FOLDERS if (folder / name).is_dir()), None)
        absent += [images[0]] if masks is None else []
        pairs.append((images[0], [("", path) for path in image_files(masks)] if masks else []))
    if absent and len(absent) < len(pairs):
        raise UserError(
            f"{absent[0]} has no folder of masks beside its own, as other images have; add it, empty if the image has "
            "no objects, or remove the image"
        )
    return pairs if any(masks for _, masks in pairs) else []


def _shared(path: Path) -> str:
    """Return the part of its name that an image shares with its mask."""
    stem = next((path.stem.removeprefix(word) for word in _BEGINNINGS if path.stem.startswith(word)), path.stem)
    return next((stem.removesuffix(word) for word in _ENDINGS if stem.endswith(word)), stem)


def _pictures(root: Path, pairs: list[tuple[Path, _Masks]], ids: dict[str, int]) -> Iterator[Picture]:
    folder, several, in_parts = common_folder([image for image, _ in pairs]), False, 0
    for image, masks in pairs:
        size = image_size(image)
        objects: list[Object] = []
        for name, path in masks:
            labels = read_label_map(path, size)
            found = regions(labels, path)
            objects += [region.to_object(ids[name]) for region in found]
            several |= len(found) > 1 or len(masks) > 1
            if len(found) == 1 and not several:
                in_parts += cv2.connectedComponents((labels != 0).astype(np.uint8))[0] > 2
        yield Picture(image, image.relative_to(folder).as_posix(), size, objects)
    if in_parts and not several:
        _log.warning(
            "%s: no mask has more than one value, though %d have separate parts. If these are several objects, give "
            "each a value of its own; now each image has one object",
            root,
            in_parts,
        )
