"""ResNet-101-FPN on COCO 2017 with the paper's recipe: its best row, 100 epochs at a learning rate of 1e-4 (Table 2).

    python train.py --config=configs/r101_fpn.py --workdir=runs/r101 --config.data.coco_dir=COCO

Cost and result at full length: not run.
"""

from ml_collections import ConfigDict

from maskrcnn_jax.config import load_config


def get_config() -> ConfigDict:
    config = load_config("r50_fpn")
    config.epochs = 100
    config.model.backbone = "resnet101"
    config.optim.lr = 1e-4
    return config
