"""What happens before a service listens: every program that it will need is compiled."""

import dataclasses
import logging
import time

import numpy as np

from maskrcnn_jax.data.transforms import RESIZE
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.inference.predictor import Predictor, Prepared
from maskrcnn_jax.serving.batching import Model
from maskrcnn_jax.structures import Batch

_log = logging.getLogger(__name__)


def with_few_sizes(model: Predictor) -> Predictor:
    """Return a predictor that pads images to a few sizes, instead of compiling for almost every image."""
    if model.padded_sizes:
        return model
    data = dataclasses.replace(model.options.data, buckets="auto")
    _log.info(
        "images are padded to the sizes of data.buckets=auto; scores may differ a little from data.buckets=exact"
    )
    return Predictor(model.network, model.categories, dataclasses.replace(model.options, data=data))


def warm_up(model: Model, max_batch: int) -> None:
    """Compute each padded size with 1, 2, 4, ... images once.

    Args:
        model: A predictor.
        max_batch: The largest number of images, a power of two.

    Raises:
        UserError: any size of images is possible.
    """
    sizes = model.padded_sizes
    if not sizes:
        raise UserError("with data.buckets=exact every image has a size of its own; serve a model with buckets=auto")
    for height, width in sizes:
        start = time.monotonic()
        for power in range(max_batch.bit_length()):
            model.predict_prepared([_blank(model, height, width)] * (1 << power), min_score=0.0)
        _log.info("images of %dx%d are ready after %.0f s", height, width, time.monotonic() - start)


def _blank(model: Model, height: int, width: int) -> Prepared:
    """Return a black image that fills a padded size."""
    shape, sizes = (height, width, model.options.model.in_channels), np.array([(height, width)], np.int32)
    images = np.zeros((1, *shape), RESIZE[model.options.data.resize])
    batch = Batch(images, sizes, sizes, np.zeros(1, np.int32), np.ones(1, bool), None)
    return Prepared(np.zeros(shape, np.uint8), batch)
