"""MobileNetV3-Large-FPN for small devices: images of 320 pixels and fewer proposals.

Command, from an ImageNet backbone:
    maskrcnn-jax train --config=mobilenet_v3_fpn --weights=torchvision:mobilenet_v3_large_v2 \\
        --workdir=runs/mobilenet --config.data.coco_dir=COCO

Cost and result: not run. Image sizes and numbers of proposals are those of torchvision's
fasterrcnn_mobilenet_v3_large_320_fpn.
"""

from ml_collections import ConfigDict

from maskrcnn_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.data.short_side = 320
    config.data.long_side = 640
    config.model.backbone = "mobilenet_v3_large"
    config.model.rpn_pre_nms_top_n_test = config.model.rpn_post_nms_top_n_test = 150
    return config
