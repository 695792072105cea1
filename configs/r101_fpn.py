"""ResNet-101-FPN on COCO 2017 with the paper's recipe, as in its best row: 100 epochs, learning rate 1e-4 (Table 2).

Command:
    maskrcnn-jax train --config=r101_fpn --workdir=runs/r101 --config.data.coco_dir=COCO

Cost and result: not run.
"""

from ml_collections import ConfigDict

from maskrcnn_jax.config import load_config


def get_config() -> ConfigDict:
    config = load_config("r50_fpn")
    config.epochs = 100
    config.model.backbone = "resnet101"
    config.optim.lr = 1e-4
    return config
