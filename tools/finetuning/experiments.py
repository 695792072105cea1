"""What is compared: where training starts from, what of the backbone is trained, and how images are augmented."""

from typing import NamedTuple

from tools.paper.experiments import Run

_FROZEN = {"optim.frozen_stages": 5}
_LARGE_SCALE_JITTER = {"data.crop_size": 256, "data.scale_jitter": (0.1, 2.0)}
_COPY_PASTE = {"data.copy_paste": 1.0}


class Recipe(NamedTuple):
    """What the backbone starts from, and what differs from configs/finetuning.py."""

    pretrained: bool
    overrides: dict[str, object]


RECIPES = {
    # A frozen norm of random weights would normalise nothing, so from random values the norms are trained.
    "random values": Recipe(False, {"model.norm": "batch", "model.norm_eps": 1e-5}),
    "pretrained": Recipe(True, {}),
    "pretrained, frozen": Recipe(True, _FROZEN),
    "pretrained, frozen; large-scale jitter": Recipe(True, _FROZEN | _LARGE_SCALE_JITTER),
    "pretrained, frozen; large-scale jitter and copy-paste": Recipe(True, _FROZEN | _LARGE_SCALE_JITTER | _COPY_PASTE),
}
PICTURED = ("random values", "pretrained", "pretrained, frozen")


def finetuning_run(name: str, seed: int) -> Run:
    """Return a training.

    Args:
        name: of the recipe.
        seed: of initial values, order and augmentation.
    """
    return Run("configs/finetuning.py", tuple(sorted(RECIPES[name].overrides.items())), seed)
