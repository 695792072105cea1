"""The paper's ablations (losses, RoI operators, proposals, ...), small enough for three seeds each on a CPU.

Command:
    python tools/reproduce_paper.py --comparisons=all --coco_dir=data/paper_shapes \\
        --weights=runs/shapes_backbone.safetensors

Each training changes one or two options. The backbone comes from a network trained by ``make train`` on other shapes,
as the paper's comes from ImageNet; tools/reproduce_paper.py explains how to write it.

Cost: about five minutes per training on one CPU core. Result: docs/results.md.
"""

from ml_collections import ConfigDict

from maskrcnn_jax.config import load_config


def get_config() -> ConfigDict:
    config = load_config("shapes")
    config.data.coco_dir = "data/paper_shapes"
    config.epochs = 2
    config.eval_every = 1000  # only after the last step
    config.eval_losses = True
    config.eval_train_limit = 100
    config.log_every = 10
    config.checkpoint_every = 0
    config.optim.warmup_steps = 50
    return config
