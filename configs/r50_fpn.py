"""ResNet-50-FPN on COCO 2017 with the paper's recipe (Sec. 3.2).

Command, from random weights; the paper starts from an ImageNet backbone (--weights=torchvision:resnet50):
    maskrcnn-jax train --config=r50_fpn --workdir=runs/r50 --config.data.coco_dir=COCO

Memory, compiled but not run: 16 images of 800 x 1344 need 20.8 GiB on one H100, or 3.3 GiB on each of eight
(docs/cluster.md). Result: not run.
"""

from ml_collections import ConfigDict

from maskrcnn_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.epochs = 50
    config.model.dtype = "bfloat16"
    config.data.color_jitter = 0.2
    return config
