"""detectron2's mask_rcnn_R_101_FPN; with ":3x", its training recipe.

Commands:
    maskrcnn-jax eval --config=detectron2_r101_fpn --weights=detectron2:mask_rcnn_R_101_FPN_3x \\
        --coco_dir=COCO --output=runs/detectron2_r101_fpn
    maskrcnn-jax train --config=detectron2_r101_fpn:3x --weights=torchvision:resnet101 \\
        --config.model.stride_in_1x1=False --workdir=runs/detectron2_r101_fpn_3x --config.data.coco_dir=COCO

Published result on val2017: box AP 42.9, mask AP 38.6 (3x schedule). Result here: not run.
Cost of 3x on 8 H100: 4.5 GiB each (compiled); at the very least 5 h, at their peak of 67 TFLOP/s in float32.
detectron2 needed 25 h on 8 V100.
detectron2_r50_fpn says where the recipe comes from.
"""

from ml_collections import ConfigDict

from maskrcnn_jax.config import load_config


def get_config(schedule: str = "") -> ConfigDict:
    config = load_config(f"detectron2_r50_fpn:{schedule}")
    config.model.backbone = "resnet101"
    return config
