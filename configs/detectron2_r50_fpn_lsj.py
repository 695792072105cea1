"""detectron2's new baseline of R50-FPN: large-scale jitter, from random weights.

The network has batch norm everywhere, a deeper RPN and convolutions in the box head.

Command, for 100 epochs; ":200ep" and ":400ep" are longer:
    maskrcnn-jax train --config=detectron2_r50_fpn_lsj:100ep --workdir=runs/detectron2_r50_fpn_lsj \\
        --config.data.coco_dir=COCO

Published result on val2017: box AP 44.6, mask AP 40.3 (100 epochs); 47.4, 42.5 (400). Result here: not run.
Cost of 100 epochs on 8 H100: 12.9 GiB each (compiled); at the very least 3 h, by the memory traffic of a step.
Recipe: configs/new_baselines of detectron2, mask_rcnn_R_50_FPN_100ep_LSJ.py and _400ep_LSJ.py, with float16 there and
bfloat16 here.
"""

from ml_collections import ConfigDict

from maskrcnn_jax.config import load_config
from maskrcnn_jax.errors import UserError

EPOCHS = {"100ep": 1, "200ep": 2, "400ep": 4}  # name -> times as long as 100 epochs


def get_config(schedule: str = "100ep") -> ConfigDict:
    """Return the config.

    Args:
        schedule: One of EPOCHS.

    Raises:
        UserError: for anything else.
    """
    if schedule not in EPOCHS:
        raise UserError(f"detectron2_r50_fpn_lsj has no schedule {schedule!r}; give one of {', '.join(EPOCHS)}")
    times = EPOCHS[schedule]
    config = load_config("detectron2_r50_fpn:1x")
    config.batch_size = 64
    config.epochs = config.max_steps = 184_375 * times
    config.eval_every = 10
    config.data.short_sides = ()
    config.data.crop_size = 1024
    config.data.scale_jitter = (0.1, 2.0)

    model = config.model
    model.dtype = "bfloat16"
    model.norm = model.head_norm = "batch"
    model.rpn_conv_depth = 2
    model.box_conv_channels = (256, 256, 256, 256)
    model.box_fc_channels = (1024,)

    optim = config.optim
    optim.lr = 0.1
    optim.lr_batch_size = 64
    optim.weight_decay = 4e-5
    optim.milestones = (163_889 * times, 177_546 * times)
    optim.warmup_steps = 500 * times  # detectron2 has it as a share of the run
    optim.warmup_factor = 0.067
    optim.frozen_stages = 0
    return config
