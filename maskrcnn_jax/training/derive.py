"""What follows from the size of the dataset and of the batch: the number of epochs, and the learning rate."""

from ml_collections import ConfigDict

from maskrcnn_jax.distributed import is_first

MIN_EPOCHS, MAX_EPOCHS = 12, 100  # 12: detectron2's 1x schedule, enough for a large dataset


def fill_in(config: ConfigDict, num_images: int) -> ConfigDict:
    """Replace what the config leaves to the data by numbers, and print them.

    Args:
      config: as configs/base.py describes it; left as it is.
      num_images: training images.

    Returns:
      A config whose ``epochs`` and ``optim.lr`` are those of the training.
    """
    config = config.copy_and_resolve_references()
    said = []
    if config.epochs == 0:
        wanted = -(-config.images_to_see // num_images)
        config.epochs = min(max(wanted, MIN_EPOCHS), MAX_EPOCHS)
        said.append(
            f"{config.epochs} epochs: {num_images} images are seen {config.epochs * num_images} times in all, where "
            f"images_to_see is {config.images_to_see}, in {MIN_EPOCHS} to {MAX_EPOCHS} epochs"
        )
    optim = config.optim
    if optim.lr_batch_size:
        lr = optim.lr * config.batch_size / optim.lr_batch_size
        said.append(
            f"learning rate {lr:g} for {config.batch_size} images a step, "
            f"as optim.lr {optim.lr:g} is for {optim.lr_batch_size}"
        )
        optim.lr, optim.lr_batch_size = lr, 0
    if is_first():
        for line in said:
            print(line)
    return config
