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

from maskrcnn_jax.data.annotation_file import AnnotationFile, mask_rle
from maskrcnn_jax.data.coco import locate, read_dataset
from maskrcnn_jax.data.images import BrokenImageError, read_image_file
from maskrcnn_jax.data.tfds_source import (
    NAME,
    VERSION,
    annotation_path,
    dataset_folder,
    index_path,
    save_arrays,
    without_masks,
)
from maskrcnn_jax.errors import UserError

_log = logging.getLogger(__name__)

_SHARD_BYTES = 128 << 20  # of image files; TFDS holds a shard in memory while it writes it


def build(
    coco_dir: str | os.PathLike,
    tfds_dir: str | os.PathLike,
    *,
    splits: Sequence[str] | None = None,
    skip_broken: bool = False,
) -> Path:
    """Writes splits of a dataset in COCO's layout as one TFDS dataset; an interrupted one is not taken for whole.

    Args:
        coco_dir: folder with ``<split>/`` and ``annotations/instances_<split>.json`` for every split.
        tfds_dir: TFDS's ``data_dir``, where the dataset goes; made if missing.
        splits: None for all that have an annotation file.
        skip_broken: keep images that cannot be read; reading them from the dataset raises BrokenImageError, too.

    Returns:
        The folder of the dataset.

    Raises:
        UserError: what ``coco.load_index`` and reading its images would raise, or the dataset exists.
    """
    if splits is None:
        paths = sorted((Path(coco_dir) / "annotations").glob("instances_*.json"))
        splits = [path.stem.removeprefix("instances_") for path in paths]
        if not splits:
            raise UserError(
                f"--coco_dir={coco_dir} has no annotations/instances_*.json; it must be a COCO-format folder"
            )
    odd = [split for split in splits if not re.fullmatch(r"[A-Za-z0-9_]+", split) or split == "all"]
    if odd:
        raise UserError(f"TFDS cannot have a split named {odd[0]!r}; rename it to letters, digits and _, but not all")
    folder = dataset_folder(tfds_dir)
    if folder.exists():
        raise UserError(f"{folder} exists already; remove it to build it again, or choose another --tfds_dir")
    # TFDS prints that it downloads a dataset of unknown size, and makes a folder for what it downloads.
    quiet, downloads = contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory()
    try:
        with tqdm(total=0, unit="image", desc="build") as progress, quiet, downloads as download_dir:
            builder = CocoInstances(
                coco_dir, splits, skip_broken, progress, data_dir=os.fspath(tfds_dir), file_format="array_record"
            )
            builder.download_and_prepare(download_dir=download_dir)
    except (OSError, RuntimeError) as e:  # the second of array_record, such as on a full disk
        raise UserError(
            f"cannot write {folder} ({e}); nothing was left there, so make room or choose another"
        ) from None
    return folder


class CocoInstances(tfds.core.ShardBasedBuilder, skip_registration=True):  # datasets are read without this code
    """The images, objects and masks of a COCO-format folder."""

    name = NAME
    VERSION = tfds.core.Version(VERSION)
    code_path = None  # TFDS looks for checksums of downloads there, by a package that it does not install

    def __init__(
        self, coco_dir: str | os.PathLike, splits: Sequence[str], skip_broken: bool, progress: tqdm, **options
    ):
        """Prepares; as ``build``, which checks the arguments first. ``options`` are those of TFDS's builders."""
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
        """Writes what is not in records, and returns a function for each shard that makes its examples."""
        paths = locate(self._coco_dir, split)
        _, file, _, _, missing = read_dataset(*paths, skip_broken=self._skip_broken, keep_unlisted=True)
        folder = Path(self.data_dir)  # a temporary one, that gets the name of the dataset when all is written
        annotation_path(folder, split).parent.mkdir(exist_ok=True)
        shutil.copyfile(file.path, annotation_path(folder, split))
        save_arrays(index_path(folder, split), without_masks(file), len(missing))
        images = [paths[1] / name for name in file.file_names]
        sizes = [path.stat().st_size if path.exists() else 0 for path in images]
        _, starts = np.unique(np.cumsum(sizes) // _SHARD_BYTES, return_index=True)
        self._progress.total += len(images)
        examples = functools.partial(self._examples, file, images)
        return [functools.partial(examples, rows) for rows in np.split(np.arange(len(images)), starts[1:])]

    def _examples(self, file: AnnotationFile, images: list[Path], shard: np.ndarray) -> Iterator[tuple[int, dict]]:
        order = np.argsort(file.image_rows, kind="stable")
        offsets = np.searchsorted(file.image_rows[order], np.arange(len(images) + 1))
        category_ids = np.array([*file.category_ids, -1])  # the row -1 finds the last one
        for i in shard.tolist():
            rows = order[offsets[i] : offsets[i + 1]]
            height, width = file.sizes[i].tolist()
            masks = [mask_rle(file, k, height, width)["counts"] if file.num_parts[k] >= 0 else b"" for k in rows]
            objects = {
                "id": file.annotation_ids[rows],
                "category_id": category_ids[file.category_rows[rows]],
                "bbox": file.boxes[rows],
                "is_crowd": file.crowd[rows],
                "segmentation": masks,
            }
            example = {
                "image": self._content(images[i], (height, width)),
                "image/id": file.image_ids[i],
                "image/filename": file.file_names[i],
                "height": height,
                "width": width,
                "objects": objects,
            }
            yield i, example
            self._progress.update()

    def _content(self, path: Path, size: tuple[int, int]) -> bytes:
        """Returns the content of an image file that can be decoded, or of any with ``skip_broken``."""
        try:
            read_image_file(path, size)
        except BrokenImageError as e:
            if not self._skip_broken:
                raise
            _log.warning("%s", e)
        return path.read_bytes() if path.is_file() else b""
