"""ResNet-50-FPN on COCO 2017 with the paper's recipe (Sec. 3.2), from scratch.

    python train.py --config=configs/r50_fpn.py --workdir=runs/r50 --config.data.coco_dir=COCO

Cost and result at full length: not run. The batch of 16 at 800 x 1344 needs about 80 GB over all devices; the paper
starts from an ImageNet backbone, which this file does not.
"""

from ml_collections import ConfigDict

from maskrcnn_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.epochs = 50
    config.model.dtype = "bfloat16"
    config.data.color_jitter = 0.2
    return config
