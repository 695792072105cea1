"""A COCO-format dataset as flat numpy arrays: what loading processes share, and how one image is read.

pycocotools keeps every annotation as a Python dictionary, several gigabytes for COCO, which every forked or spawned
loading process then copies. Here a dataset is a few flat arrays, and what is wrong with it is found when it is opened,
not an hour into the training.
"""

import logging
import os
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from maskrcnn_jax.data.annotation_file import AnnotationFile, mask_rle, read_annotation_file
from maskrcnn_jax.data.categories import Categories
from maskrcnn_jax.data.findings import Kind, Report, stop
from maskrcnn_jax.data.formats import correct_formats
from maskrcnn_jax.data.images import read_image_file
from maskrcnn_jax.errors import UserError

_log = logging.getLogger(__name__)


class ImageAnnotations(NamedTuple):
    """The n annotated objects of one image, in the order of their file."""

    ids: np.ndarray  # [n] int64
    labels: np.ndarray  # [n] int32, 1..C
    boxes: np.ndarray  # [n, 4] float32 x1, y1, x2, y2 in pixels of the image file
    crowd: np.ndarray  # [n] bool
    has_mask: np.ndarray  # [n] bool


@dataclass(frozen=True, eq=False)
class CocoIndex:
    """N images and their K annotations, sorted by image; image i owns ``offsets[i]:offsets[i + 1]``."""

    annotation_path: Path  # of the file that all of this comes from
    image_dir: Path
    categories: Categories
    image_ids: np.ndarray  # [N] int64
    sizes: np.ndarray  # [N, 2] int32 (height, width)
    file_names: np.ndarray  # [N] unicode, relative to image_dir
    offsets: np.ndarray  # [N + 1] int64
    annotation_ids: np.ndarray  # [K] int64
    labels: np.ndarray  # [K] int32, 0 for objects of a category that the file does not list
    boxes: np.ndarray  # [K, 4] float32, clipped to the image
    crowd: np.ndarray  # [K] bool; objects of categories that are not listed count as crowds, too
    first_part: np.ndarray  # [K] int64, first polygon of the annotation, or its row in the run-length masks
    num_parts: np.ndarray  # [K] int32, polygons of the annotation; 0 means a run-length mask, -1 none
    coordinates: np.ndarray  # float64 x, y, x, y ... of all polygons; float32 would move some rasters by a pixel
    part_offsets: np.ndarray  # [P + 1] int64 into coordinates
    rle_counts: np.ndarray  # uint8, compressed run lengths as pycocotools has them, end to end
    rle_offsets: np.ndarray  # [R + 1] int64 into rle_counts
    problems: dict[str, int]  # what was wrong with the dataset and repaired or dropped -> how often

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def num_objects(self) -> np.ndarray:
        """Number of annotated objects in each image, [N] int64, crowds not counted."""
        before = np.concatenate([[0], np.cumsum(~self.crowd)])
        return before[self.offsets[1:]] - before[self.offsets[:-1]]

    @property
    def has_mask(self) -> np.ndarray:
        """Which annotations have a mask, [K] bool."""
        return self.num_parts >= 0

    def image_path(self, i: int) -> Path:
        """Returns the path of an image file."""
        return self.image_dir / str(self.file_names[i])

    def annotations(self, i: int, with_crowd: bool = False) -> ImageAnnotations:
        """Returns the objects of image ``i``; training never wants crowds."""
        rows = self._rows(i, with_crowd)
        return ImageAnnotations(
            self.annotation_ids[rows], self.labels[rows], self.boxes[rows], self.crowd[rows], self.has_mask[rows]
        )

    def masks(self, i: int, with_crowd: bool = False) -> np.ndarray:
        """Rasterises the masks of image ``i``, row for row those of ``annotations``.

        Returns:
            [n, h, w] uint8, 0 or 1, at the resolution of the image file; 0 for objects without a mask.

        Raises:
            UserError: a run-length mask does not describe an image of this size.
        """
        height, width = map(int, self.sizes[i])
        rows = self._rows(i, with_crowd)
        masks = np.zeros((len(rows), height, width), np.uint8)
        for mask, row in zip(masks, rows, strict=True):
            if self.num_parts[row] < 0:
                continue
            try:
                columns = coco_mask.decode(self.rle(row, height, width)).T  # pycocotools stores column after column
                corner = mask[: columns.shape[1], : columns.shape[0]]
                cv2.transpose(columns, dst=corner)  # several times as fast as a transposing copy in numpy
            except ValueError:
                details = {"annotation": self.annotation_ids[row], "image": self.file_names[i]}
                raise UserError(Kind.UNFILLED.tell(size=f"{height}x{width}", **details)) from None
        return masks

    def read_image(self, i: int, channels: int = 3) -> np.ndarray:
        """Reads image ``i`` as [h, w, channels] uint8, as ``decode_image`` does.

        The orientation in EXIF is ignored, because COCO's annotations refer to the pixels as they are stored.

        Raises:
            BrokenImageError: the file is missing, truncated, not an image, of another size than annotated, or has
                fewer channels.
        """
        return read_image_file(self.image_path(i), tuple(self.sizes[i].tolist()), channels)

    def _rows(self, i: int, with_crowd: bool) -> np.ndarray:
        rows = np.arange(self.offsets[i], self.offsets[i + 1])
        return rows if with_crowd else rows[~self.crowd[rows]]

    def rle(self, row: int, height: int, width: int) -> dict:
        """Returns a run-length mask of the top-left part of the image that holds the object: it is all that counts."""
        first, num = self.first_part[row], self.num_parts[row]
        if num > 0:
            start, stop = self.part_offsets[[first, first + num]]
            x_max, y_max = self.coordinates[start:stop].reshape(-1, 2).max(axis=0)
            height, width = min(height, max(0, int(y_max)) + 2), min(width, max(0, int(x_max)) + 2)
        return mask_rle(self, row, height, width)

    def mask_bytes(self, row: int) -> bytes:
        """Returns what the file says about the mask of a row; equal for equal masks."""
        first, num = self.first_part[row], self.num_parts[row]
        if num == 0:
            return self.rle_counts[self.rle_offsets[first] : self.rle_offsets[first + 1]].tobytes()
        return self.coordinates[self.part_offsets[first] : self.part_offsets[first + max(num, 0)]].tobytes()


def load_index(
    coco_dir: str | os.PathLike,
    split: str,
    *,
    skip_broken: bool = False,
    contiguous_labels: bool = False,
    keep_unlisted: bool = False,
) -> CocoIndex:
    """Opens one split of a dataset in COCO's layout and checks it.

    Boxes are clipped to their image. Annotations that cannot be used (an empty box, a box outside the image, neither
    box nor mask) are dropped; ``problems`` of the result counts them, and one warning reports them.

    Args:
        coco_dir: folder with ``<split>/`` and ``annotations/instances_<split>.json``.
        split: for example "train2017".
        skip_broken: keep images whose file is missing instead of raising; reading them raises BrokenImageError.
        contiguous_labels: number COCO's categories from 1 to 80 instead of by their ids.
        keep_unlisted: accept objects of categories that the file does not list, as crowds; otherwise an error.

    Returns:
        The index, images in the order of the file.

    Raises:
        UserError: the folder has another layout, the JSON is broken or contradicts itself, or image files are missing.
    """
    json_path, image_dir = locate(coco_dir, split)
    return read_dataset(
        json_path, image_dir, skip_broken=skip_broken, contiguous_labels=contiguous_labels, keep_unlisted=keep_unlisted
    ).index


class ReadDataset(NamedTuple):
    """An index beside where its rows stand in the annotation file."""

    index: CocoIndex
    file: AnnotationFile
    rows: np.ndarray  # [K] int64, row in ``file`` of each annotation of the index; its images are those of the index
    problems: dict[str, np.ndarray]  # kind of problem -> places in the file's annotations
    missing: np.ndarray  # rows of the images whose files are missing


def read_dataset(
    json_path: Path,
    image_dir: Path,
    *,
    skip_broken: bool = False,
    contiguous_labels: bool = False,
    keep_unlisted: bool = False,
    report: Report = stop,
) -> ReadDataset:
    """Does what ``load_index`` does with an annotation file and a folder of images.

    Args:
        report: called with what is wrong; see ``read_annotation_file``.
    """
    file = read_annotation_file(json_path, keep_unlisted=keep_unlisted, report=report)
    file = correct_formats(file, report)
    missing = _find_missing(image_dir, file, report if not skip_broken else lambda fault: None)
    index, rows, problems = arrange(file, image_dir, contiguous_labels, report)
    if len(missing):
        index.problems["image files missing"] = len(missing)
    if report is stop:
        warn_of_problems(index)
    return ReadDataset(index, file, rows, problems, missing)


def warn_of_problems(index: CocoIndex) -> None:
    """Logs how often what was wrong with a dataset."""
    if index.problems:
        listed = ", ".join(f"{count} {what}" for what, count in index.problems.items())
        _log.warning("%s: %s", index.annotation_path, listed)


def drop_labels(index: CocoIndex, share: float, seed: int) -> CocoIndex:
    """Forgets annotations, as if nobody had made them; those that a smaller share forgets are among them.

    Args:
        index: the dataset; its images all stay.
        share: of the annotations, 0..1.
        seed: of the choice.

    Raises:
        UserError: a share outside 0..1.
    """
    if not 0 <= share <= 1:
        raise UserError(f"data.drop_labels {share} must be a share, 0..1")
    num = len(index.labels)
    kept = np.sort(np.random.default_rng(seed).permutation(num)[round(share * num) :])
    per_annotation = ("annotation_ids", "labels", "boxes", "crowd", "first_part", "num_parts")
    return replace(
        index,
        offsets=np.searchsorted(kept, index.offsets),
        **{name: getattr(index, name)[kept] for name in per_annotation},
    )


def annotations_name(split: str) -> str:
    """Returns where the annotations of a split lie in COCO's layout."""
    return f"annotations/instances_{split}.json"


def locate(coco_dir: str | os.PathLike, split: str) -> tuple[Path, Path]:
    """Returns the annotation file and the folder of images of a split in COCO's layout.

    Raises:
        UserError: the folder has another layout.
    """
    root = Path(coco_dir)
    layout = f"a folder that holds {split}/ (the images) and {annotations_name(split)}"
    if not os.fspath(coco_dir):
        raise UserError(f"no dataset was given; set --config.data.coco_dir to {layout}")
    if not root.is_dir():
        raise UserError(f"coco_dir {root} is not a folder; set --config.data.coco_dir to {layout}")
    json_path, image_dir = root / annotations_name(split), root / split
    absent = [
        str(path) for path, found in ((json_path, json_path.is_file()), (image_dir, image_dir.is_dir())) if not found
    ]
    if absent:
        raise UserError(
            f"coco_dir {root} lacks {' and '.join(absent)}; --config.data.coco_dir must be {layout}, or "
            "--config.data.train_split and --config.data.eval_split what the splits are called there"
        )
    return json_path, image_dir


def _find_missing(image_dir: Path, file: AnnotationFile, report: Report) -> np.ndarray:
    """Returns the rows of images without a file; one listing of the folder is cheaper than a look at every file."""
    with os.scandir(image_dir) as entries:
        present = {entry.name for entry in entries if entry.is_file()}
    missing = [
        row
        for row, name in enumerate(file.file_names)
        if name not in present and not (os.path.dirname(name) and os.path.isfile(image_dir / name))
    ]
    if missing:
        alike = find_alike(present, [file.file_names[row] for row in missing[:3]])
        such = ", ".join(f"{name} (there is {other})" if other else name for name, other in alike.items())
        details = {"total": len(file.file_names), "folder": image_dir, "names": such}
        report(Kind.MISSING_FILE.finding(file.image_places[missing], **details))
    return np.array(missing, np.int64)


def find_alike(present: set[str], names: list[str]) -> dict[str, str | None]:
    """Finds for names of missing files those of a folder that differ by folders before it or by case alone."""
    lower = Counter(name.lower() for name in present)
    by_lower = {name.lower(): name for name in present}
    wanted = {name: name.replace("\\", "/").rpartition("/")[2].lower() for name in names}
    return {name: by_lower[key] if lower[key] == 1 else None for name, key in wanted.items()}


def arrange(
    file: AnnotationFile, image_dir: Path, contiguous_labels: bool, report: Report = stop
) -> tuple[CocoIndex, np.ndarray, dict[str, np.ndarray]]:
    """Clips and drops boxes, then sorts the annotations by image.

    Returns:
        ``index``, ``rows`` and ``problems`` of ReadDataset.
    """
    categories = Categories.create(file.category_ids, file.category_names, contiguous_labels)
    sizes = file.sizes
    limits = sizes[file.image_rows][:, [1, 0, 1, 0]].astype(np.float32)  # [K, 4]
    boxes = file.boxes.copy()
    with np.errstate(over="ignore"):  # what ends at infinity is cut off at the border, too
        boxes[:, 2:] += boxes[:, :2]
    clipped = np.clip(boxes, 0, limits)
    positive = (file.boxes[:, 2] > 0) & (file.boxes[:, 3] > 0)
    inside = (clipped[:, 2] > clipped[:, 0]) & (clipped[:, 3] > clipped[:, 1])
    keep = positive & inside
    # Coordinates are rounded in the file, so that many boxes pass the border by a hundredth of a pixel.
    moved = keep & (np.abs(clipped - boxes) > 1).any(axis=1)
    problems = {
        kind: file.places[rows]
        for kind, rows in (
            (Kind.FLAT_BOX, ~positive),
            (Kind.OUTSIDE_BOX, positive & ~inside),
            (Kind.CLIPPED_BOX, moved),
        )
        if rows.any()
    }
    problems = file.problems | problems
    counts = {kind: len(places) for kind, places in problems.items()}
    if file.num_annotations and not keep.any():
        listed = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        report(Kind.NOTHING_USABLE.finding(total=file.num_annotations, path=file.path, problems=listed))
    order = np.flatnonzero(keep)
    order = order[np.argsort(file.image_rows[order], kind="stable")]
    # The last one is found by the row -1, of categories that are not listed.
    label_of_column = np.array([*(categories.labels[categories.ids.index(i)] for i in file.category_ids), 0], np.int32)
    index = CocoIndex(
        annotation_path=file.path,
        image_dir=image_dir,
        categories=categories,
        image_ids=file.image_ids,
        sizes=sizes,
        file_names=np.array(file.file_names, dtype=np.str_),
        offsets=np.searchsorted(file.image_rows[order], np.arange(len(sizes) + 1)),
        annotation_ids=file.annotation_ids[order],
        labels=label_of_column[file.category_rows[order]],
        boxes=clipped[order],
        crowd=(file.crowd | (file.category_rows < 0))[order],
        first_part=file.first_part[order],
        num_parts=file.num_parts[order],
        coordinates=file.coordinates,
        part_offsets=file.part_offsets,
        rle_counts=file.rle_counts,
        rle_offsets=file.rle_offsets,
        problems=counts,
    )
    return index, order, problems
