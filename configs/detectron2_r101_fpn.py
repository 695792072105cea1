"""detectron2's mask_rcnn_R_101_FPN.

    python eval.py --config=configs/detectron2_r101_fpn.py --weights=detectron2:mask_rcnn_R_101_FPN_3x \
        --config.data.coco_dir=COCO --output=runs/detectron2_r101_fpn

Published on val2017: box AP 42.9, mask AP 38.6 (3x schedule). Here on val2017: not run.
"""

from ml_collections import ConfigDict

from maskrcnn_jax.config import load_config


def get_config() -> ConfigDict:
    config = load_config("detectron2_r50_fpn")
    config.model.backbone = "resnet101"
    return config
