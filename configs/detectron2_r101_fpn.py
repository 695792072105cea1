"""detectron2's mask_rcnn_R_101_FPN.

Command:
    maskrcnn-jax eval --config=detectron2_r101_fpn --weights=detectron2:mask_rcnn_R_101_FPN_3x \\
        --coco_dir=COCO --output=runs/detectron2_r101_fpn

Published result on val2017: box AP 42.9, mask AP 38.6 (3x schedule).
Result here: not run.
"""

from ml_collections import ConfigDict

from maskrcnn_jax.config import load_config


def get_config() -> ConfigDict:
    config = load_config("detectron2_r50_fpn")
    config.model.backbone = "resnet101"
    return config
