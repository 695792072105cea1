"""detectron2's mask_rcnn_R_50_FPN, with its anchors, RoIAlign, losses, mask targets, mask pasting and resizing.

Command:
    maskrcnn-jax eval --config=detectron2_r50_fpn --weights=detectron2:mask_rcnn_R_50_FPN_3x \\
        --coco_dir=COCO --output=runs/detectron2_r50_fpn

Published result on val2017: box AP 41.0, mask AP 37.2 (3x schedule); 38.6, 35.2 (1x).
Result here: not run.
"""

from ml_collections import ConfigDict

from maskrcnn_jax.config import default_config


def get_config() -> ConfigDict:
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
    return config
