"""Reads the dataset that tools/build_tfds.py writes: the samples of the COCO-format folder it was made from.

Images and masks come from TFDS's records, as they are needed. What must be known of all images at once lies beside
the records as flat arrays, so that opening a dataset reads none of them, and COCO's annotation file, with which
evaluations compare.
"""

import dataclasses
import json
import os
import threading
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from maskrcnn_jax.data.annotation_file import AnnotationFile, read_annotation_file
from maskrcnn_jax.data.coco import CocoIndex, annotations_name, arrange, warn_of_problems
from maskrcnn_jax.data.images import check_and_decode
from maskrcnn_jax.errors import UserError

NAME, VERSION = "coco_instances", "1.0.0"


def dataset_folder(tfds_dir: str | os.PathLike) -> Path:
    """Returns the folder in which TFDS keeps the dataset."""
    return Path(tfds_dir) / NAME / VERSION


def annotation_path(folder: Path, split: str) -> Path:
    """Returns where a dataset has the annotation file of a split."""
    return folder / annotations_name(split)


def index_path(folder: Path, split: str) -> Path:
    """Returns where a dataset has the flat arrays of a split."""
    return folder / "annotations" / f"index_{split}.npz"


class Records:
    """The examples of a split, for any number of threads; a process that is handed them opens the files anew."""

    def __init__(self, tfds_dir: str | os.PathLike, split: str):
        """Opens the split.

        Args:
            tfds_dir: TFDS's ``data_dir``.
            split: of the dataset in it.
        """
        # TFDS takes long to import, for those who do not use it.
        import tensorflow_datasets as tfds

        self._tfds_dir, self._split = os.fspath(tfds_dir), split
        self._source = tfds.data_source(
            NAME,
            split=split,
            data_dir=self._tfds_dir,
            download=False,
            decoders={"image": tfds.decode.SkipDecoding()},
        )
        self._last = threading.local()

    def __reduce__(self) -> tuple:
        return Records, (self._tfds_dir, self._split)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, i: int) -> dict:
        """Returns an example; each thread keeps its last one, of which first the image and then the masks are wanted.

        Raises:
            UserError: files are missing or damaged.
        """
        if getattr(self._last, "i", None) != i:
            try:
                self._last.example = self._source[i]
            except Exception as e:  # of array_record, protobuf or TFDS, wherever the damage shows
                raise UserError(
                    f"example {i} of {self._split} in {dataset_folder(self._tfds_dir)} cannot be read ({e}); "
                    "remove that folder and build it again by tools/build_tfds.py"
                ) from None
            self._last.i = i
        return self._last.example


@dataclass(frozen=True, eq=False)
class TfdsIndex(CocoIndex):
    """As CocoIndex, with images and masks in records; ``first_part`` is the place of an object in its record."""

    records: Records

    def read_image(self, i: int, channels: int = 3) -> np.ndarray:
        """Reads image ``i`` as CocoIndex does; the path in errors is that of the file before, in this folder."""
        return check_and_decode(self.image_path(i), self.records[i]["image"], tuple(self.sizes[i].tolist()), channels)

    def rle(self, row: int, height: int, width: int) -> dict:
        """Returns the run-length mask of a row."""
        return {"size": [height, width], "counts": self.mask_bytes(row)}

    def mask_bytes(self, row: int) -> bytes:
        """Returns the run lengths of the mask of a row."""
        i = int(np.searchsorted(self.offsets, row, side="right")) - 1
        return self.records[i]["objects"]["segmentation"][self.first_part[row]]


def load_tfds_index(
    tfds_dir: str | os.PathLike, split: str, *, contiguous_labels: bool = False, keep_unlisted: bool = False
) -> TfdsIndex:
    """Opens one split of a dataset; the samples are those of ``coco.load_index`` on the folder it was made from.

    Args:
        tfds_dir: folder that tools/build_tfds.py wrote, TFDS's ``data_dir``.
        split: for example "train2017".
        contiguous_labels: as ``coco.load_index`` has it.
        keep_unlisted: likewise.

    Raises:
        UserError: the folder holds no such dataset or split, or its annotations are refused.
    """
    folder = dataset_folder(tfds_dir)
    how = "a folder that tools/build_tfds.py wrote"
    if not os.fspath(tfds_dir):
        raise UserError(f"no dataset was given; set --config.data.tfds_dir to {how}")
    if not folder.is_dir():
        raise UserError(f"tfds_dir {tfds_dir} has no {NAME}/{VERSION}; set --config.data.tfds_dir to {how}")
    path = annotation_path(folder, split)
    if not path.is_file():
        splits = sorted(p.stem.removeprefix("instances_") for p in path.parent.glob("instances_*.json"))
        raise UserError(f"{folder} has no split {split}; use one of {', '.join(splits)}, or build it again with it")
    file, num_missing = load_arrays(index_path(folder, split), path)
    if not keep_unlisted and (file.category_rows < 0).any():
        read_annotation_file(path)  # which says what is wrong
    index, *_ = arrange(file, folder / split, contiguous_labels)
    if num_missing:
        index.problems["image files missing"] = num_missing
    warn_of_problems(index)
    records = Records(tfds_dir, split)
    if len(records) != len(index):
        raise UserError(
            f"{folder} has {len(records)} examples of {len(index)} images of {split}; remove that folder and build it "
            "again by tools/build_tfds.py"
        )
    return TfdsIndex(**vars(index), records=records)


def save_arrays(path: Path, file: AnnotationFile, num_missing: int) -> None:
    """Writes annotations as arrays, without the path of the file that they come from."""
    values = {name: value for name, value in vars(file).items() if name != "path"}
    problems = json.dumps({kind: places.tolist() for kind, places in file.problems.items()})
    np.savez(path, **values | {"problems": problems, "num_missing": num_missing})


def load_arrays(path: Path, source: Path) -> tuple[AnnotationFile, int]:
    """Reads what ``save_arrays`` wrote.

    Args:
        path: of the arrays.
        source: path of the annotation file that they come from.

    Returns:
        The annotations, and the number of images whose files were missing.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        values = _read_stored(path)
        problems = json.loads(values["problems"].item())
        values["problems"] = {kind: np.array(places, np.int64) for kind, places in problems.items()}
        for name in ("num_annotations", "category_shift", "category_ids", "category_names", "file_names"):
            values[name] = values[name].tolist()
        num_missing = values.pop("num_missing").item()
        return AnnotationFile(path=source, **values), num_missing
    except Exception:  # what zipfile, zlib and NumPy raise at damaged files is told nowhere
        raise UserError(
            f"{path} cannot be read (missing or damaged); remove {path.parent.parent} and build it again by "
            "tools/build_tfds.py"
        ) from None


def _read_stored(path: Path) -> dict[str, np.ndarray]:
    """Reads the arrays of a file that np.savez wrote: without code, and without parts that grow when unpacked."""
    with zipfile.ZipFile(path) as archive:
        if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
            raise ValueError("compressed parts")
    with np.load(path, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}


def without_masks(file: AnnotationFile) -> AnnotationFile:
    """Sorts annotations by image, as records have them, and leaves the masks to the records."""
    order = np.argsort(file.image_rows, kind="stable")
    image_rows = file.image_rows[order]
    firsts = np.searchsorted(image_rows, image_rows)  # of each image's annotations
    per_annotation = ("places", "annotation_ids", "category_rows", "boxes", "crowd")
    return dataclasses.replace(
        file,
        image_rows=image_rows,
        first_part=np.arange(len(order)) - firsts,
        num_parts=np.minimum(file.num_parts[order], 0),
        coordinates=np.zeros(0),
        part_offsets=np.zeros(1, np.int64),
        rle_counts=np.zeros(0, np.uint8),
        rle_offsets=np.zeros(1, np.int64),
        **{name: getattr(file, name)[order] for name in per_annotation},
    )
