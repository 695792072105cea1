"""torchvision's maskrcnn_resnet50_fpn_v2: batch norm everywhere, a deeper RPN, convolutions in the box head.

Command:
    maskrcnn-jax eval --config=torchvision_r50_fpn_v2 --weights=torchvision:maskrcnn_resnet50_fpn_v2 \\
        --coco_dir=COCO --output=runs/torchvision_r50_fpn_v2

Published result on val2017: box AP 47.4, mask AP 41.8. Result here: not run.
"""

from ml_collections import ConfigDict

from maskrcnn_jax.config import load_config


def get_config() -> ConfigDict:
    config = load_config("torchvision_r50_fpn")
    model = config.model
    model.norm = model.head_norm = "batch"
    model.norm_eps = 1e-5
    model.rpn_conv_depth = 2
    model.box_conv_channels = (256, 256, 256, 256)
    model.box_fc_channels = (1024,)
    return config
