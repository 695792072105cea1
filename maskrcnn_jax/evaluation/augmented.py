"""Detects on a split with test-time augmentation, image by image, since the views of an image differ in size."""

import functools
import itertools
import logging
from collections.abc import Iterator

import jax
import numpy as np
from tqdm import tqdm

from maskrcnn_jax.data.categories import Categories
from maskrcnn_jax.data.coco import CocoDataset
from maskrcnn_jax.data.images import BrokenImageError
from maskrcnn_jax.distributed import is_first
from maskrcnn_jax.inference.detect import map_in_processes
from maskrcnn_jax.inference.results import to_coco_results
from maskrcnn_jax.inference.views import Augmentation, AugmentedDetection
from maskrcnn_jax.models.mask_rcnn import MaskRCNN
from maskrcnn_jax.options import Options

_log = logging.getLogger(__name__)


def detect_augmented(
    network: MaskRCNN,
    augmentation: Augmentation,
    *,
    options: Options,
    categories: Categories,
    dataset: CocoDataset,
    rows: np.ndarray,
) -> list[dict]:
    """Detect on images of a dataset; several processes share them.

    Args:
        network: of the model.
        augmentation: the views of each image.
        options: how images are resized and masks are pasted.
        categories: what the labels of the model mean.
        dataset: the images.
        rows: [n] of the dataset, those to detect on.

    Returns:
        COCO results of this process's share.

    Raises:
        BrokenImageError: if an image cannot be read and ``data.skip_broken`` is not set.
    """
    detection = AugmentedDetection(network, options, augmentation)
    read: list[int] = []

    def images() -> Iterator[np.ndarray]:
        share = rows[jax.process_index() :: jax.process_count()]
        for row in tqdm(share.tolist(), unit="image", desc="detect", disable=not is_first()):
            try:
                image = dataset.read_image(row, options.model.in_channels)
            except BrokenImageError as error:
                if not options.data.skip_broken:
                    raise
                _log.warning("skipped: %s", error)
                continue
            read.append(row)
            yield image

    def found() -> Iterator[dict]:
        for number, instances in enumerate(detection.find(images())):
            row = read[number]
            image_id, image_size = int(dataset.image_ids[row]), dataset.sizes[row]
            yield {"instances": instances, "image_id": image_id, "image_size": image_size}

    encode = functools.partial(
        to_coco_results,
        category_ids=dict(zip(categories.labels, categories.ids, strict=True)),
        aligned_masks=options.model.roi_aligned,
    )
    return list(itertools.chain.from_iterable(map_in_processes(encode, found(), options.eval_workers)))
