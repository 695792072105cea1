"""Fine-tuning on a few hundred images of your own; docs/own_dataset.md is a tutorial.

Commands, for a GPU, for a laptop, and for trying everything in minutes on a CPU:
    maskrcnn-jax train --config=own_dataset --weights=torchvision:maskrcnn_resnet50_fpn_v2 --workdir=runs/own \\
        --config.data.coco_dir=MINE
    maskrcnn-jax train --config=own_dataset:laptop --weights=torchvision:maskrcnn_resnet50_fpn --workdir=runs/own \\
        --config.data.coco_dir=MINE
    maskrcnn-jax train --config=own_dataset:small --workdir=runs/own --config.data.coco_dir=MINE

MINE holds train/, val/ and annotations/instances_{train,val}.json. The number of classes is read from the annotations.
If the weights have another number of classes, the predictors of classes, boxes and masks are reinitialised. The
laptop variant has a lighter network, half of the image size and fewer steps. The small variant is a network of a tenth
of the size, trained from random weights on images of 128 pixels.

Cost and result with published weights: not run. Of the small variant: docs/own_dataset.md.
"""

from ml_collections import ConfigDict

from maskrcnn_jax.config import load_config
from maskrcnn_jax.errors import UserError

_STARTS = {"full": "torchvision_r50_fpn_v2", "laptop": "torchvision_r50_fpn", "small": "shapes"}


def get_config(which: str = "full") -> ConfigDict:
    """Return the config.

    Args:
        which: "full", "laptop" or "small"; what follows the colon of --config.

    Raises:
        UserError: if it is another word.
    """
    if which not in _STARTS:
        raise UserError(f"own_dataset has no {which!r}; give own_dataset: and one of {', '.join(_STARTS)}")
    config = load_config(_STARTS[which])
    config.epochs = 0  # chosen by images_to_see
    config.eval_every = 10
    config.checkpoint_every = 200
    config.data.train_split = "train"
    config.data.eval_split = "val"
    config.data.coco_dir = ""
    config.data.color_jitter = 0.2
    if which == "small":
        config.images_to_see = 2500  # minutes
        config.eval_every = 25
        config.model.fpn_channels = 32
        config.optim.lr = 3e-3
        config.optim.lr_batch_size = 8
        return config

    # Small batches for one GPU. With few padded sizes, few programs are compiled.
    config.batch_size = config.eval_batch_size = 4
    config.data.short_side, config.data.long_side = (640, 1066) if which == "full" else (320, 533)
    if which == "laptop":
        config.images_to_see = 2000  # an hour on two cores
    config.data.resize = "uint8"
    config.data.buckets = "auto"
    model = config.model
    model.norm = "frozen"  # four images are too few for batch statistics
    if model.head_norm == "batch":
        model.head_norm = "frozen"
    model.box_batch_size_per_image = 128  # as in detectron2's tutorial for small datasets
    config.optim.frozen_stages = 2  # the stem and the first stage, as in torchvision: low-level features transfer
    # SGD with torchvision's and detectron2's learning rate, 0.02 for 16 images, scaled linearly with the batch size
    # (Goyal et al. 2017, Accurate, Large Minibatch SGD).
    config.optim.kind = "sgd"
    config.optim.lr = 0.02
    config.optim.lr_batch_size = 16
    config.optim.clip_norm = 10.0  # clips outliers only
    return config
