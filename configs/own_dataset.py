"""Fine-tuning on a dataset of your own in COCO's format, of some hundred images; docs/own_dataset.md walks through it.

    python train.py --config=configs/own_dataset.py --weights=torchvision:maskrcnn_resnet50_fpn_v2 --workdir=runs/own \
        --config.data.coco_dir=DIR

    DIR/train/*.jpg  DIR/val/*.jpg  DIR/annotations/instances_train.json  DIR/annotations/instances_val.json

The number of classes comes from the annotations, whatever their ids; the predictors of classes, boxes and masks begin
anew where the weights have another number of classes. That is for a GPU. --config=configs/own_dataset.py:laptop with
--weights=torchvision:maskrcnn_resnet50_fpn has a lighter network, half of the pixels and fewer steps. With :small, and
without --weights, a network of a tenth of the size learns from scratch on images of 128 pixels, to try everything in
minutes on two CPU cores.

With published weights: not run. The small one: docs/own_dataset.md.
"""

from ml_collections import ConfigDict

from maskrcnn_jax.config import load_config
from maskrcnn_jax.errors import UserError

_STARTS = {"full": "torchvision_r50_fpn_v2", "laptop": "torchvision_r50_fpn", "small": "shapes"}


def get_config(which: str = "full") -> ConfigDict:
    """Return the config.

    Args:
      which: what follows the colon of --config: "full", "laptop" or "small".

    Raises:
      UserError: for anything else.
    """
    if which not in _STARTS:
        raise UserError(
            f"own_dataset has no {which!r}; give --config=configs/own_dataset.py: and one of {', '.join(_STARTS)}"
        )
    config = load_config(_STARTS[which])
    config.epochs = 0  # as many as the number of images suggests
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

    # Four images padded to a few sizes, so that little is compiled.
    config.batch_size = config.eval_batch_size = 4
    config.data.short_side, config.data.long_side = (640, 1066) if which == "full" else (320, 533)
    if which == "laptop":
        config.images_to_see = 2000  # an hour of two cores
    config.data.resize = "uint8"
    config.data.buckets = "auto"
    model = config.model
    model.norm = "frozen"  # four images are too few for statistics
    if model.head_norm == "batch":
        model.head_norm = "frozen"
    model.box_batch_size_per_image = 128  # as detectron2's tutorial for small datasets
    config.optim.frozen_stages = 2  # the stem and the first stage have learnt what all images share (torchvision)
    # SGD with torchvision's and detectron2's rate, 0.02 for 16 images. It scales in proportion to the batch: a step
    # with half of the images is to go half as far (Goyal et al. 2017, Accurate, Large Minibatch SGD).
    config.optim.kind = "sgd"
    config.optim.lr = 0.02
    config.optim.lr_batch_size = 16
    config.optim.clip_norm = 10.0  # only what is far off
    return config
