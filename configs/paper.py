"""The paper's own network and recipe (Sec. 2 and 3): one row of its Table 1 or 2.

Command:
    maskrcnn-jax train --config=paper:table=1,row=3 --workdir=runs/paper_1_3 --config.data.coco_dir=COCO \\
        --weights=torchvision:resnet50

Differences from torchvision's network, which the other configs have: three anchor scales and a wider RPN (Sec. 2.6),
masks without deconvolution (Sec. 2.5), proposals from ground-truth boxes first (Sec. 2.2). Training starts from an
ImageNet backbone, of which nothing is frozen. A V100 has no bfloat16: add --config.model.dtype=float16, which scales
the loss (Sec. 3.2).

Cost: about 3 to 44 hours a row at 50 images per second (estimated). Result: not run, see docs/results.md.
"""

from typing import NamedTuple

from ml_collections import ConfigDict

from maskrcnn_jax.config import default_config
from maskrcnn_jax.errors import UserError


class Row(NamedTuple):
    """A row of the tables: the training, and the paper's accuracies in per cent."""

    backbone: str
    epochs: int
    train_size: int  # images; the validation set has 5000, all of val2017
    lr: float
    train_accuracy: int
    val_accuracy: int


ROWS = {  # (table, row)
    (1, 1): Row("resnet50", 30, 20_000, 5e-4, 40, 38),
    (1, 2): Row("resnet50", 50, 50_000, 5e-4, 48, 45),
    (1, 3): Row("resnet50", 100, 50_000, 5e-4, 54, 46),
    (1, 4): Row("resnet50", 100, 80_000, 5e-4, 55, 46),
    (2, 1): Row("resnet101", 30, 20_000, 7e-4, 43, 40),
    (2, 2): Row("resnet101", 50, 50_000, 7e-4, 49, 46),
    (2, 3): Row("resnet101", 100, 50_000, 1e-4, 53, 47),
}


def get_config(which: str = "table=1,row=1") -> ConfigDict:
    """Return the config of a row.

    Args:
        which: What follows the colon of --config, such as "table=1,row=3".

    Raises:
        UserError: if there is no such row.
    """
    rows = {f"table={table},row={row}": values for (table, row), values in ROWS.items()}
    if which not in rows:
        raise UserError(f"the paper has no {which!r}; give paper: and one of {'; '.join(rows)}")
    row = rows[which]
    config = default_config()
    config.epochs = row.epochs
    config.eval_losses = True
    config.eval_train_limit = 5000
    config.optim.lr = row.lr
    config.data.train_limit = row.train_size
    config.data.color_jitter = 0.2
    config.model.backbone = row.backbone
    config.model.dtype = "bfloat16"
    config.model.anchor_scales = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))
    config.model.rpn_channels = 512
    config.model.mask_deconv = False
    config.model.train_proposals = "gt_then_rpn"
    return config
