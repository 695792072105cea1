"""detectron2's mask_rcnn_R_50_FPN, with its anchors, RoIAlign, losses, mask targets, mask pasting and resizing.

With ":1x" or ":3x", its training recipe too.

Commands:
    maskrcnn-jax eval --config=detectron2_r50_fpn --weights=detectron2:mask_rcnn_R_50_FPN_3x \\
        --coco_dir=COCO --output=runs/detectron2_r50_fpn
    maskrcnn-jax train --config=detectron2_r50_fpn:3x --weights=torchvision:resnet50 \\
        --config.model.stride_in_1x1=False --workdir=runs/detectron2_r50_fpn_3x --config.data.coco_dir=COCO

Published result on val2017: box AP 41.0, mask AP 37.2 (3x schedule); 38.6, 35.2 (1x). Result here: not run.
Cost of 3x on 8 H100: 3.0 GiB each (compiled); at the very least 4 h, at their peak of 67 TFLOP/s in float32.
detectron2 needed 20 h on 8 V100.
Recipe: configs/Base-RCNN-FPN.yaml and configs/COCO-InstanceSegmentation of detectron2. It starts from MSRA's R-50.pkl,
whose names this package cannot read. torchvision's backbone has its strides in the 3x3 convolutions, hence the option
above. detectron2 leaves out images without objects, 1 % of COCO's; here they stay.
"""

from ml_collections import ConfigDict

from maskrcnn_jax.config import default_config
from maskrcnn_jax.errors import UserError

SCHEDULES = {  # name -> steps of 16 images, and where the learning rate falls
    "1x": (90_000, (60_000, 80_000)),
    "3x": (270_000, (210_000, 250_000)),
}


def get_config(schedule: str = "") -> ConfigDict:
    """Return the config.

    Args:
        schedule: Of the training recipe, one of SCHEDULES; empty for the published weights.

    Raises:
        UserError: for anything else.
    """
    if schedule not in ("", *SCHEDULES):
        raise UserError(f"detectron2's configs have no schedule {schedule!r}; give one of {', '.join(SCHEDULES)}")
    config = default_config()
    model = config.model
    model.norm = "frozen"
    model.stride_in_1x1 = True
    model.exact_anchors = True
    model.rpn_min_size = 1e-6  # drops empty boxes only
    model.rpn_post_nms_top_n_train = 1000
    model.roi_aligned = True
    model.roi_sampling_ratio = 0
    model.box_min_size = 0.0
    model.mask_targets_binary = True
    model.rpn_fixed_normalizer = True
    model.smooth_l1_beta = 0.0  # L1
    config.data.resize = "pillow"
    config.data.buckets = "exact"
    config.data.contiguous_labels = True
    config.eval_batch_size = 1
    if schedule:
        config.max_steps, milestones = SCHEDULES[schedule]
        config.epochs = config.max_steps  # more than there can be: steps decide, whatever the batch and the dataset
        config.data.buckets = "auto"  # "exact" would compile a program for each of hundreds of sizes
        config.data.short_sides = (640, 672, 704, 736, 768, 800)
        optim = config.optim
        optim.kind = "sgd"
        optim.lr = 0.02
        optim.lr_batch_size = 16
        optim.schedule = "multistep"
        optim.milestone_unit = "steps"
        optim.milestones = milestones
        optim.warmup_steps = 1000
        optim.decay_biases = True
        optim.clip_norm = 0.0
        optim.frozen_stages = 2
    return config
