"""Options that follow from the size of the dataset and of the batch: the number of epochs and the learning rate."""

import dataclasses
import logging

from maskrcnn_jax.options import Options

_log = logging.getLogger(__name__)

MIN_EPOCHS, MAX_EPOCHS = 12, 100  # 12: detectron2's 1x schedule, enough for a large dataset


def derive_options(options: Options, num_images: int) -> Options:
    """Return options whose ``epochs`` and ``optim.lr`` are those of the training, and log how they came about.

    Args:
        options: Of the run.
        num_images: Training images.
    """
    if options.epochs == 0:
        wanted = -(-options.images_to_see // num_images)
        epochs = min(max(wanted, MIN_EPOCHS), MAX_EPOCHS)
        options = dataclasses.replace(options, epochs=epochs)
        _log.info(
            "epochs 0: %d epochs of %d images, %d in all (images_to_see is %d; %d to %d epochs)",
            epochs,
            num_images,
            epochs * num_images,
            options.images_to_see,
            MIN_EPOCHS,
            MAX_EPOCHS,
        )
    optim = options.optim
    if optim.lr_batch_size:
        lr = optim.lr * options.batch_size / optim.lr_batch_size
        _log.info(
            "learning rate %g for a batch of %d (optim.lr is %g for %d)",
            lr,
            options.batch_size,
            optim.lr,
            optim.lr_batch_size,
        )
        options = dataclasses.replace(options, optim=dataclasses.replace(optim, lr=lr, lr_batch_size=0))
    return options
