"""torchvision's maskrcnn_resnet50_fpn_v2: batch norm everywhere, a deeper RPN, convolutions in the box head.

With ":train", its training recipe too: large-scale jitter for 400 epochs.

Commands; training starts from random weights, as torchvision's did:
    maskrcnn-jax eval --config=torchvision_r50_fpn_v2 --weights=torchvision:maskrcnn_resnet50_fpn_v2 \\
        --coco_dir=COCO --output=runs/torchvision_r50_fpn_v2
    maskrcnn-jax train --config=torchvision_r50_fpn_v2:train --workdir=runs/torchvision_r50_fpn_v2_trained \\
        --config.data.coco_dir=COCO

Published result on val2017: box AP 47.4, mask AP 41.8. Result here: not run.
Cost of training on 8 H100: 26 GiB each (compiled); at the very least 56 h, at their peak of 67 TFLOP/s in float32.
Recipe: torchvision's pull request 5773, which gives the command: 32 GPUs with two images each.
"""

from ml_collections import ConfigDict

from maskrcnn_jax.config import load_config


def get_config(which: str = "") -> ConfigDict:
    config = load_config(f"torchvision_r50_fpn:{which}")
    model = config.model
    model.norm = model.head_norm = "batch"
    model.norm_eps = 1e-5
    model.rpn_conv_depth = 2
    model.box_conv_channels = (256, 256, 256, 256)
    model.box_fc_channels = (1024,)
    if which:
        config.batch_size = 64
        config.epochs = 400
        config.eval_every = 10
        config.data.crop_size = 1024
        config.data.scale_jitter = (0.1, 2.0)
        config.optim.lr = 0.1
        config.optim.lr_batch_size = 64
        config.optim.milestones = (352, 384)
        config.optim.weight_decay = 4e-5
        config.optim.frozen_stages = 0
    return config
