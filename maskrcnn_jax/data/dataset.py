"""Opens a dataset from its source."""

from maskrcnn_jax.data.coco import CocoIndex, load_index
from maskrcnn_jax.data.tfds_source import load_tfds_index
from maskrcnn_jax.options import DataOptions


def load_dataset(data: DataOptions, split: str) -> CocoIndex:
    """Opens one split of a dataset.

    Args:
        data: Options of the data.
        split: for example "train2017".

    Returns:
        Its index; the same from every source.

    Raises:
        UserError: if the dataset cannot be used; the message says why.
    """
    options = {"contiguous_labels": data.contiguous_labels, "keep_unlisted": data.ignore_regions}
    if data.source == "coco":
        return load_index(data.coco_dir, split, skip_broken=data.skip_broken, **options)
    return load_tfds_index(data.tfds_dir, split, **options)
