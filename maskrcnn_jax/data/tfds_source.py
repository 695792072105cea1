"""Reads the dataset that ``tfds_builder`` writes: the samples of the COCO-format folder it was made from.

Images and masks come from TFDS's records, as they are needed. The other annotations come from a copy of COCO's
annotation file beside the records, so that opening a dataset reads none of them.
"""

import os
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np

from maskrcnn_jax.data.annotations import read_annotations
from maskrcnn_jax.data.areas import drop_impossible_areas
from maskrcnn_jax.data.coco import CocoDataset, annotations_name, clip_boxes
from maskrcnn_jax.data.images import check_and_decode
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.paths import local_path

NAME, VERSION = "coco_instances", "1.0.0"


def dataset_folder(tfds_dir: str | os.PathLike) -> Path:
    """Return the folder in which TFDS keeps the dataset."""
    return local_path(tfds_dir, "tfds_dir") / NAME / VERSION


def annotation_path(folder: Path, split: str) -> Path:
    """Return the path of a split's annotation file in a dataset."""
    return folder / annotations_name(split)


class Records:
    """The examples of a split, for any number of threads. A process that unpickles them opens the files again."""

    def __init__(self, tfds_dir: str | os.PathLike, split: str, rows: np.ndarray | None = None):
        """Open the split.

        Args:
            tfds_dir: TFDS's ``data_dir``.
            split: of the dataset in it.
            rows: of its examples, where only some are wanted.
        """
        # TFDS takes long to import, for those who do not use it.
        import tensorflow_datasets as tfds

        self._tfds_dir, self._split, self._rows = os.fspath(tfds_dir), split, rows
        self._source = tfds.data_source(
            NAME,
            split=split,
            data_dir=self._tfds_dir,
            download=False,
            decoders={"image": tfds.decode.SkipDecoding()},
        )
        self._last = threading.local()

    def __reduce__(self) -> tuple:
        return Records, (self._tfds_dir, self._split, self._rows)

    def __len__(self) -> int:
        return len(self._source) if self._rows is None else len(self._rows)

    def take(self, rows: np.ndarray) -> Self:
        """Return some of the examples."""
        return type(self)(self._tfds_dir, self._split, rows if self._rows is None else self._rows[rows])

    def __getitem__(self, i: int) -> dict:
        """Return an example. Each thread caches its last one, whose image and masks are read one after the other.

        Raises:
            UserError: files are missing or damaged.
        """
        if getattr(self._last, "i", None) != i:
            try:
                self._last.example = self._source[i if self._rows is None else int(self._rows[i])]
            except Exception as error:  # of array_record, protobuf or TFDS, wherever the damage shows
                raise UserError(
                    f"example {i} of {self._split} in {dataset_folder(self._tfds_dir)} cannot be read ({error}); "
                    "remove that folder and build it again by maskrcnn-jax build-tfds"
                ) from None
            self._last.i = i
        return self._last.example


_MASKS_IN_RECORDS = {
    "coordinates": np.zeros(0),
    "part_offsets": np.zeros(1, np.int64),
    "rle_counts": np.zeros(0, np.uint8),
    "rle_offsets": np.zeros(1, np.int64),
}


@dataclass(frozen=True, eq=False)
class TfdsDataset(CocoDataset):
    """A CocoDataset with images and masks in records; ``first_part`` is the place of an object in its record."""

    records: Records

    def read_image(self, i: int, channels: int = 3) -> np.ndarray:
        """Read image ``i`` as CocoDataset does; errors name the file that it was made from, in this folder."""
        return check_and_decode(self.image_path(i), self.records[i]["image"], tuple(self.sizes[i].tolist()), channels)

    def mask_bytes(self, row: int) -> bytes:
        """Return the run lengths of the mask of a row; all masks in records are run lengths."""
        i = int(np.searchsorted(self.offsets, row, side="right")) - 1
        return self.records[i]["objects"]["segmentation"][self.first_part[row]]

    def take_images(self, rows: np.ndarray) -> Self:
        """Return the dataset with some of its images, as CocoDataset does."""
        return replace(super().take_images(rows), records=self.records.take(rows))


def load_tfds(
    tfds_dir: str | os.PathLike,
    split: str,
    *,
    contiguous_labels: bool = False,
    keep_unlisted: bool = False,
    keep_flat: bool = False,
) -> TfdsDataset:
    """Open one split of a dataset; the samples are those of ``load_coco`` on the folder that it was made from.

    Args:
        tfds_dir: folder that ``tfds_builder.build`` wrote, TFDS's ``data_dir``.
        split: for example "train2017".
        contiguous_labels: as in ``load_coco``.
        keep_unlisted: as in ``load_coco``.
        keep_flat: as in ``load_coco``.

    Raises:
        UserError: the folder holds no such dataset or split, or its annotations are refused.
    """
    folder = dataset_folder(tfds_dir)
    how = "a folder that maskrcnn-jax build-tfds wrote"
    if not os.fspath(tfds_dir):
        raise UserError(f"no dataset was given; set data.tfds_dir to {how}")
    if not folder.is_dir():
        raise UserError(f"tfds_dir {tfds_dir} has no {NAME}/{VERSION}; set data.tfds_dir to {how}")
    path = annotation_path(folder, split)
    if not path.is_file():
        splits = sorted(p.stem.removeprefix("instances_") for p in path.parent.glob("instances_*.json"))
        raise UserError(f"{folder} has no split {split}; use one of {', '.join(splits)}, or build it again with it")
    dataset = read_annotations(path, folder / split, contiguous_labels=contiguous_labels, keep_unlisted=keep_unlisted)
    dataset = clip_boxes(drop_impossible_areas(dataset))
    dataset.log_problems()
    records = Records(tfds_dir, split)
    if len(records) != len(dataset):
        raise UserError(
            f"{folder} has {len(records)} examples of {len(dataset)} images of {split}; remove that folder and build "
            "it again by maskrcnn-jax build-tfds"
        )
    per_image = np.diff(dataset.offsets)
    dataset = TfdsDataset(
        **vars(dataset)
        | _MASKS_IN_RECORDS
        | {
            "first_part": np.arange(len(dataset.labels)) - np.repeat(dataset.offsets[:-1], per_image),
            "num_parts": np.minimum(dataset.num_parts, 0),
        },
        records=records,
    )
    return dataset if keep_flat else dataset.without_flat()
