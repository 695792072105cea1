"""Finds the layout of a dataset: COCO's, as several tools export it, or one that has to be converted.

Tools agree on COCO's JSON, but not on its name or on where the images lie. Only names of files are looked at, and the
first image names of an annotation file where several folders could hold its images.
"""

import itertools
import json
import mmap
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from maskrcnn_jax.data.file_names import plain_name
from maskrcnn_jax.data.images import IMAGE_SUFFIXES
from maskrcnn_jax.paths import in_bucket

IMAGE_FOLDERS = ("images", "image", "imgs", "img")
MASK_FOLDERS = ("masks", "mask", "labels", "label", "instances", "instance_masks", "annotations", "gt")
MASK_ENDINGS = ("_cp_masks", "_masks", "_mask", "_labels", "_label", "_instances", "_instance")
YOLO, LABELME, VOC = "YOLO's layout", "labelme's layout", "Pascal VOC's layout"
LABEL_IMAGES = "a layout of images and instance masks"
# Words in the name of an annotation file that do not name a split.
_NO_SPLIT = frozenset({"", "annotation", "annotations", "coco", "data", "dataset", "export", "instances", "json"})
_NO_SPLIT |= {"labels", "result", "results", "default"}
_ROLES = {"train": ("train",), "val": ("val", "dev", "eval", "test")}  # beginnings of names, best first
_STANDARD = {"train": "train", "train2017": "train", "val": "val", "val2017": "val"}
_MOST_PEEKED = 64  # JSON files of a folder
_LONGEST_TEXT = 1 << 20  # bytes of a YAML file


class Files(NamedTuple):
    """The annotations of a split and the folder that their file names are relative to."""

    json_path: Path
    image_dir: Path


class Layout(NamedTuple):
    """How a dataset lies in a folder."""

    name: str  # such as "Roboflow's COCO layout"
    root: Path  # below the folder that was given, where an archive has put one more
    splits: dict[str, Files]  # empty if the dataset has to be converted


def find_layout(folder: Path) -> Layout | None:
    """Find the layout of a dataset; None if it is no known one.

    Args:
        folder: of the dataset. Folders that hold only one other folder, as archives do, are passed through.
    """
    for root in _nested(folder):
        splits = _coco_splits(root)
        if splits:
            return Layout(_coco_name(root, splits), root, splits)
        for name, is_there in _CONVERTIBLE.items():
            if not in_bucket(root) and is_there(root):  # they are converted on a disk
                return Layout(name, root, {})
    return None


def match_split(split: str, names: list[str]) -> str | None:
    """Find the split that a name stands for: itself, or that of the same role if it is one of the standard names.

    Args:
        split: that is wanted, such as "val2017".
        names: of the splits that are there, such as ["train", "valid"].
    """
    role = _STANDARD.get(split)
    if split in names or role is None:
        return split if split in names else None
    for beginning in _ROLES[role]:
        for name in sorted(names):
            if name.lower().startswith(beginning):
                return name
    is_only = role == "train" and len(names) == 1 and not names[0].lower().startswith(_ROLES["val"])
    return names[0] if is_only else None


def folders_in(root: Path) -> list[Path]:
    """Return the folders in a folder, sorted."""
    return [path for path in entries_of(root) if path.is_dir()]


def image_files(folder: Path) -> list[Path]:
    """Return the image files in a folder, sorted."""
    return sorted(path for path in entries_of(folder) if path.suffix.lower() in IMAGE_SUFFIXES)


def describe(folder: Path) -> str:
    """Name the first entries of a folder, for messages."""
    names = [path.name + "/" * path.is_dir() for path in itertools.islice(entries_of(folder), 6)]
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") if names else "nothing"


def entries_of(folder: Path) -> list[Path]:
    """Return what is in a folder, sorted, without hidden files and those that macOS adds to archives."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if not path.name.startswith((".", "__MACOSX")))


def _nested(folder: Path) -> Iterator[Path]:
    for _ in range(4):
        yield folder
        entries = entries_of(folder)
        if len(entries) != 1 or not entries[0].is_dir():
            return
        folder = entries[0]


def _coco_splits(root: Path) -> dict[str, Files]:
    """Return the annotation files of a folder and of the folders in it, by split."""
    splits: dict[str, Files] = {}
    for folder in (root / "annotations", root, *folders_in(root)):
        for path in _coco_files(folder):
            name = _split_name(path, root)
            if name not in splits:
                splits[name] = Files(path, _image_dir(path, name, root))
        if any(files.json_path.name.startswith("instances_") for files in splits.values()):
            break  # COCO's own layout, whose folders of images need not be listed
    return splits


def _coco_files(folder: Path) -> list[Path]:
    paths = [path for path in entries_of(folder) if path.suffix == ".json" and path.is_file()]
    for pattern in (r"_annotations\.coco", "instances_.+"):  # beside which COCO has captions and key points
        named = [path for path in paths if re.fullmatch(pattern, path.stem)]
        if named:
            return named
    return [path for path in paths[:_MOST_PEEKED] if _holds(path, b'"images"', b'"annotations"')]


def _split_name(path: Path, root: Path) -> str:
    if path.stem.startswith("instances_"):
        return path.stem.removeprefix("instances_")
    words = [word for word in re.split(r"[_\-. ]", path.stem) if word.lower() not in _NO_SPLIT]
    if words:
        return "_".join(words)
    return "default" if path.parent in (root, root / "annotations") else path.parent.name


def _image_dir(json_path: Path, split: str, root: Path) -> Path:
    """Return the folder that holds the images which an annotation file lists first."""
    usual = [root / split, root / "images" / split, root / split / "images", json_path.parent / "images"]
    usual += [root / "images", json_path.parent, root]
    folders = [folder for folder in dict.fromkeys([*usual, *folders_in(root)]) if folder.is_dir()]
    names = _first_names(json_path)
    forms = [{name, plain_name(name)} for name in names]
    found = {folder: sum(any(os.path.isfile(folder / name) for name in form) for form in forms) for folder in folders}
    best = max(folders, key=lambda folder: found[folder])
    if found[best]:
        return best
    return next((folder for folder in usual if image_files(folder)), usual[0])


def _first_names(json_path: Path) -> list[str]:
    """Return the first file names in an annotation file, without decoding it."""
    try:
        with json_path.open("rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # closed with the last match
            found = re.finditer(rb'"file_name"\s*:\s*("(?:[^"\\\n]|\\.){1,1024}")', content)
            return [json.loads(match[1].decode(errors="replace")) for match in itertools.islice(found, 8)]
    except (OSError, ValueError):  # an empty file, or an escape that is none
        return []


def _holds(path: Path, *words: bytes) -> bool:
    """Whether a file holds all of these words."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return all(content.find(word) >= 0 for word in words)
    except (OSError, ValueError):
        return False


def _coco_name(root: Path, splits: dict[str, Files]) -> str:
    names = {files.json_path.name for files in splits.values()}
    folders = {files.image_dir.name for files in splits.values()}
    if "_annotations.coco.json" in names:
        return "Roboflow's COCO layout"
    if "instances_default.json" in names:
        return "CVAT's COCO layout"
    if "result.json" in names:
        return "Label Studio's COCO layout"
    if (root / "JPEGImages").is_dir() or "dataset.json" in names:
        return "labelme2coco's COCO layout"
    if folders == set(splits) and all(name.startswith("instances_") for name in names):
        return "COCO's layout"
    return "COCO's format"


def yaml_of(root: Path) -> Path | None:
    """Return the YAML file that describes a dataset in YOLO's layout, None if there is none."""
    for path in entries_of(root):
        if path.suffix in (".yaml", ".yml") and path.is_file() and path.stat().st_size <= _LONGEST_TEXT:
            text = path.read_bytes()
            if re.search(rb"^(?:\xef\xbb\xbf)?['\"]?names['\"]?\s*:", text, re.MULTILINE):
                return path
    return None


def _is_yolo(root: Path) -> bool:
    folders = [root / "labels", *folders_in(root / "labels")]
    return yaml_of(root) is not None or any(path.suffix == ".txt" for f in folders for path in entries_of(f)[:3])


def _is_labelme(root: Path) -> bool:
    below = folders_in(root)
    for folder in (root, *below, *(part for outer in below for part in folders_in(outer)[:3])):
        first = [path for path in entries_of(folder) if path.suffix == ".json"][:3]
        if any(_holds(path, b'"shapes"', b'"imagePath"') for path in first):
            return True
    return False


def _is_voc(root: Path) -> bool:
    if (root / "SegmentationObject").is_dir():
        return True
    return any(path.suffix == ".xml" for path in entries_of(root / "Annotations"))


def _has_label_images(root: Path) -> bool:
    folders = [root, *folders_in(root)]
    folders += [path for folder in folders[1:] for path in folders_in(folder)[:1]]  # train/<image>/masks
    return any(
        mask_folder(folder) is not None or any(path.stem.endswith(MASK_ENDINGS) for path in image_files(folder))
        for folder in folders
    )


def mask_folder(folder: Path) -> Path | None:
    """Return the folder with the masks of the images in ``images/`` or ``image/`` beside it, None if there is none."""
    if not any((folder / name).is_dir() for name in IMAGE_FOLDERS):
        return None
    folders = [folder / name for name in MASK_FOLDERS]
    return next((path for path in folders if image_files(path) or folders_in(path)), None)


_CONVERTIBLE = {YOLO: _is_yolo, VOC: _is_voc, LABELME: _is_labelme, LABEL_IMAGES: _has_label_images}
