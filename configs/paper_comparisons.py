"""What the paper compares (loss sets, RoI operators, proposals, ...), at a size for three seeds of each on a CPU.

    python tools/reproduce_paper.py --comparisons=all

changes a line or two of it for each training. The backbone is to come from a network that ``make train`` trained on
other shapes, as the paper's comes from ImageNet. Results: docs/results.md.
"""

from ml_collections import ConfigDict

from maskrcnn_jax.config import load_config


def get_config() -> ConfigDict:
    config = load_config("shapes")
    config.data.coco_dir = "data/paper_shapes"
    config.epochs = 2
    config.eval_every = 1000  # after the last step only
    config.eval_losses = True
    config.eval_train_limit = 100
    config.log_every = 10
    config.checkpoint_every = 0
    config.optim.warmup_steps = 50
    return config
