"""Opens a dataset from where the config says that it is."""

from ml_collections import ConfigDict

from maskrcnn_jax.data.coco import CocoIndex, load_index
from maskrcnn_jax.data.tfds_source import load_tfds_index
from maskrcnn_jax.errors import UserError


def load_dataset(data: ConfigDict, split: str) -> CocoIndex:
    """Opens one split of a dataset.

    Args:
        data: the part of the config, as configs/base.py describes it.
        split: for example "train2017".

    Returns:
        Its index; the same from every source.

    Raises:
        UserError: an unknown source, or a dataset that cannot be used; the message says why.
    """
    options = {"contiguous_labels": data.contiguous_labels, "keep_unlisted": data.ignore_regions}
    if data.source == "coco":
        return load_index(data.coco_dir, split, skip_broken=data.skip_broken, **options)
    if data.source == "tfds":
        return load_tfds_index(data.tfds_dir, split, **options)
    raise UserError(f"data.source {data.source!r} is unknown; use coco with data.coco_dir, or tfds with data.tfds_dir")
