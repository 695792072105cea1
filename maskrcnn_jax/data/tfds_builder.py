"""Writes a COCO-format folder as a TFDS dataset with masks, ``coco_instances``, in a few large files.

TFDS's own ``coco`` has no masks and needs TensorFlow. Its usual builders hand what is larger than a gigabyte to
TensorFlow for shuffling, so this one writes shard after shard, in the order of the annotation file.
"""

import contextlib
import functools
import io
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from maskrcnn_jax.data.coco import CocoDataset
from maskrcnn_jax.data.dataset import load_coco
from maskrcnn_jax.data.images import BrokenImageError, read_image_file
from maskrcnn_jax.data.layouts import find_layout
from maskrcnn_jax.data.tfds_source import NAME, VERSION, annotation_path, dataset_folder
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.paths import local_path

_log = logging.getLogger(__name__)

_SHARD_BYTES = 128 << 20  # of image files; TFDS holds a shard in memory while it writes it


def build(
    coco_dir: str | os.PathLike,
    tfds_dir: str | os.PathLike,
    *,
    splits: Sequence[str] | None = None,
    skip_broken: bool = False,
) -> Path:
    """Write splits of a dataset in COCO's layout as one TFDS dataset; an interrupted one is not taken for whole.

    Args:
        coco_dir: folder with ``<split>/`` and ``annotations/instances_<split>.json`` for every split.
        tfds_dir: TFDS's ``data_dir``, where the dataset goes; made if missing.
        splits: None for all that have an annotation file.
        skip_broken: keep images that cannot be read; reading them from the dataset raises BrokenImageError, too.

    Returns:
        The folder of the dataset.

    Raises:
        UserError: what ``load_coco`` and reading its images would raise, or the dataset exists.
    """
    if splits is None:
        layout = find_layout(local_path(coco_dir, "coco_dir"))
        splits = sorted(layout.splits) if layout else []
        if not splits:
            raise UserError(f"{coco_dir} has no annotations/instances_*.json; it must be a COCO-format folder")
    odd = [split for split in splits if not re.fullmatch(r"[A-Za-z0-9_]+", split) or split == "all"]
    if odd:
        raise UserError(
            f"TFDS cannot have a split named {odd[0]!r}; use letters, digits and _, and not the reserved name 'all'"
        )
    folder = dataset_folder(tfds_dir)
    if folder.exists():
        raise UserError(f"{folder} exists already; remove it to build it again, or choose another folder")
    # TFDS prints that it downloads a dataset of unknown size, and makes a folder for what it downloads.
    quiet, downloads = contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory()
    try:
        with tqdm(total=0, unit="image", desc="build") as progress, quiet, downloads as download_dir:
            builder = CocoInstances(
                coco_dir, splits, skip_broken, progress, data_dir=os.fspath(tfds_dir), file_format="array_record"
            )
            builder.download_and_prepare(download_dir=download_dir)
    except (OSError, RuntimeError) as error:  # the second of array_record, such as on a full disk
        raise UserError(
            f"cannot write {folder} ({error}); nothing was left there, so make room or choose another"
        ) from None
    return folder


# Not registered, because datasets are read without this code. TFDS has no types.
class CocoInstances(tfds.core.ShardBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """The images, objects and masks of a COCO-format folder."""

    name = NAME
    VERSION = tfds.core.Version(VERSION)
    code_path = None  # TFDS looks for checksums of downloads there, by a package that it does not install

    def __init__(
        self, coco_dir: str | os.PathLike, splits: Sequence[str], skip_broken: bool, progress: tqdm, **options
    ):
        """Prepare to build, with arguments that ``build`` has checked; ``options`` are those of TFDS's builders."""
        self._coco_dir, self._splits, self._skip_broken, self._progress = coco_dir, splits, skip_broken, progress
        super().__init__(**options)

    def _info(self) -> tfds.core.DatasetInfo:
        objects = {
            "id": np.int64,
            "category_id": np.int64,  # -1 where the annotation file does not list it
            "bbox": tfds.features.Tensor(shape=(4,), dtype=np.float32),  # x, y, width, height in pixels
            "is_crowd": np.bool_,
            "segmentation": tfds.features.Text(),  # pycocotools' compressed run lengths; empty for none
        }
        features = {
            "image": tfds.features.Image(),  # the file, byte for byte
            "image/id": np.int64,
            "image/filename": tfds.features.Text(),
            "height": np.int32,
            "width": np.int32,
            "objects": tfds.features.Sequence(objects),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="Images with boxes and masks of their objects, in the order of annotations/instances_*.json.",
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,
        )

    def _shard_iterators_per_split(self, dl_manager) -> dict[str, list]:
        return {split: self._shards(split) for split in self._splits}

    def _shards(self, split: str) -> list:
        """Copy the annotation file, and return a function for each shard that makes its examples."""
        dataset = load_coco(self._coco_dir, split, skip_broken=self._skip_broken, keep_unlisted=True, keep_flat=True)
        # A temporary folder, which gets the name of the dataset when everything is written.
        path = annotation_path(Path(self.data_dir), split)
        path.parent.mkdir(exist_ok=True)
        shutil.copyfile(dataset.annotation_path, path)
        images = [dataset.image_path(i) for i in range(len(dataset))]
        sizes = [path.stat().st_size if path.exists() else 0 for path in images]
        _, starts = np.unique(np.cumsum(sizes) // _SHARD_BYTES, return_index=True)
        self._progress.total += len(images)
        examples = functools.partial(self._examples, dataset)
        return [functools.partial(examples, rows) for rows in np.split(np.arange(len(images)), starts[1:])]

    def _examples(self, dataset: CocoDataset, shard: np.ndarray) -> Iterator[tuple[int, dict]]:
        category_ids = np.where(dataset.labels > 0, dataset.category_ids, -1)
        around = np.concatenate([dataset.boxes[:, :2], dataset.boxes[:, 2:] - dataset.boxes[:, :2]], axis=1)
        boxes = np.where(np.isnan(dataset.file_boxes), around, dataset.file_boxes).astype(np.float32)
        for i in shard.tolist():
            rows = np.arange(dataset.offsets[i], dataset.offsets[i + 1])
            height, width = dataset.sizes[i].tolist()
            objects = {
                "id": dataset.annotation_ids[rows],
                "category_id": category_ids[rows],
                "bbox": boxes[rows],
                "is_crowd": dataset.iscrowd[rows],
                "segmentation": [
                    dataset.rle(row, height, width)["counts"] if dataset.num_parts[row] >= 0 else b"" for row in rows
                ],
            }
            example = {
                "image": self._content(dataset.image_path(i), (height, width)),
                "image/id": dataset.image_ids[i],
                "image/filename": str(dataset.file_names[i]),
                "height": height,
                "width": width,
                "objects": objects,
            }
            yield i, example
            self._progress.update()

    def _content(self, path: Path, size: tuple[int, int]) -> bytes:
        """Return the content of an image file that can be decoded, or of any with ``skip_broken``."""
        try:
            read_image_file(path, size)
        except BrokenImageError as error:
            if not self._skip_broken:
                raise
            _log.warning("%s", error)
        return path.read_bytes() if path.is_file() else b""
