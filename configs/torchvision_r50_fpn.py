"""torchvision's maskrcnn_resnet50_fpn: the same network, arithmetic and resizing.

With ":train", its training recipe too.

Commands:
    maskrcnn-jax eval --config=torchvision_r50_fpn --weights=torchvision:maskrcnn_resnet50_fpn \\
        --coco_dir=COCO --output=runs/torchvision_r50_fpn
    maskrcnn-jax train --config=torchvision_r50_fpn:train --weights=torchvision:resnet50 \\
        --workdir=runs/torchvision_r50_fpn_trained --config.data.coco_dir=COCO

Published result on val2017: box AP 37.9, mask AP 34.6. Result here: not run.
Cost of training on 8 H100: 3.1 GiB each (compiled); at the very least 3 h, at their peak of 67 TFLOP/s in float32.
Recipe: the README of torchvision's references/detection. torchvision leaves out images without objects, 1 % of COCO's;
here they stay.
"""

from ml_collections import ConfigDict

from maskrcnn_jax.config import default_config
from maskrcnn_jax.errors import UserError


def get_config(which: str = "") -> ConfigDict:
    """Return the config.

    Args:
        which: "train" for the training recipe; empty for the published weights.

    Raises:
        UserError: for anything else.
    """
    if which not in ("", "train"):
        raise UserError(f"torchvision's configs have no {which!r} after the colon; give train, or no colon")
    config = default_config()
    config.model.norm = "frozen"
    config.model.norm_eps = 0.0  # of the published weights
    config.data.resize = "float32"
    config.data.buckets = "exact"
    config.eval_batch_size = 1
    if which:
        config.model.norm_eps = 1e-5  # of the ImageNet backbone
        config.data.buckets = "auto"  # "exact" would compile a program for each of hundreds of sizes
        config.epochs = 26
        optim = config.optim
        optim.kind = "sgd"
        optim.lr = 0.02
        optim.lr_batch_size = 16
        optim.schedule = "multistep"
        optim.milestones = (16, 22)
        optim.warmup_steps = 1000
        optim.decay_norms = optim.decay_biases = True
        optim.clip_norm = 0.0
        optim.frozen_stages = 2
    return config
