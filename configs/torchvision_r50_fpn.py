"""torchvision's maskrcnn_resnet50_fpn: the same network, arithmetic and resizing.

Command:
    maskrcnn-jax eval --config=torchvision_r50_fpn --weights=torchvision:maskrcnn_resnet50_fpn \\
        --coco_dir=COCO --output=runs/torchvision_r50_fpn

Published result on val2017: box AP 37.9, mask AP 34.6. Result here: not run.
"""

from ml_collections import ConfigDict

from maskrcnn_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.model.norm = "frozen"
    config.model.norm_eps = 0.0  # of the published weights; 1e-5 with those of an ImageNet backbone
    config.data.resize = "float32"
    config.data.buckets = "exact"
    config.eval_batch_size = 1
    return config
