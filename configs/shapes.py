"""The embedded default: a small backbone on small synthetic images, for a laptop without a GPU.

    make train

writes the dataset (python -m maskrcnn_jax.data.shapes data/shapes), trains on it into runs/shapes and evaluates it.
"""

from ml_collections import ConfigDict

from maskrcnn_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.epochs = 6
    config.batch_size = 8  # from scratch, many small steps learn more than few large ones
    config.eval_every = 3
    config.eval_batch_size = 20

    config.data.coco_dir = "data/shapes"
    config.data.short_side = config.data.long_side = 128
    config.data.mask_side = 128
    config.data.threads = 2

    model = config.model
    model.backbone = "resnet18"
    model.stem_channels = model.stage_channels = 32
    model.fpn_channels = 64
    model.anchor_sizes = (12, 24, 48, 96, 192)
    model.rpn_batch_size_per_image = 128
    model.rpn_pre_nms_top_n_train = 200
    model.rpn_post_nms_top_n_train = 200
    model.rpn_pre_nms_top_n_test = 100
    model.rpn_post_nms_top_n_test = 100
    model.box_fc_channels = (256, 256)
    model.roi_aligned = True  # half a pixel matters to objects of ten
    model.roi_sampling_ratio = 1  # bins are smaller than a feature cell here
    model.box_batch_size_per_image = 32
    model.box_detections_per_img = 30
    model.mask_channels = 32

    config.optim.lr = 1.5e-3
    config.optim.warmup_steps = 200
    return config
