"""What is compared: trainings from random values, from pretrained weights, and from these with frozen stages."""

from typing import NamedTuple

from tools.paper.experiments import Run

# Tried with seed 0. The best of each start is in STARTS.
LEARNING_RATES = (5e-4, 2e-3)


class Start(NamedTuple):
    """What the backbone starts from, and the recipe that goes with it."""

    pretrained: bool
    overrides: dict[str, object]
    lr: float


# A frozen norm of random weights would normalise nothing, so from random values the norms are trained.
_TRAINED_NORMS: dict[str, object] = {"model.norm": "batch", "model.norm_eps": 1e-5}
STARTS = {
    "random values": Start(False, _TRAINED_NORMS, 2e-3),
    "pretrained": Start(True, {}, 5e-4),
    "pretrained, stem and first stage frozen": Start(True, {"optim.frozen_stages": 2}, 5e-4),
}
SEARCHED = tuple(name for name, start in STARTS.items() if "optim.frozen_stages" not in start.overrides)


def finetuning_run(start: Start, seed: int) -> Run:
    """Return a training.

    Args:
        start: one of STARTS, or one with another learning rate.
        seed: of initial values, order and augmentation.
    """
    fields = {**start.overrides, "optim.lr": start.lr}
    return Run("configs/finetuning.py", tuple(sorted(fields.items())), seed)
