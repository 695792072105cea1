"""What is compared: trainings from random values, from pretrained weights, and from these with frozen stages."""

from collections.abc import Mapping
from typing import NamedTuple

from tools.paper.experiments import Run

LEARNING_RATES = (5e-4, 2e-3)


class Start(NamedTuple):
    """What the backbone starts from, and what goes with it."""

    pretrained: bool
    overrides: dict[str, object]
    searched: str  # the start whose best learning rate this one has


STARTS = {
    # A frozen norm of random weights would normalise nothing, so from random values the norms are trained.
    "random values": Start(False, {"model.norm": "batch", "model.norm_eps": 1e-5}, "random values"),
    "pretrained": Start(True, {}, "pretrained"),
    "pretrained, stem and first stage frozen": Start(True, {"optim.frozen_stages": 2}, "pretrained"),
}
SEARCHED = tuple(name for name, start in STARTS.items() if start.searched == name)


def finetuning_run(name: str, lr: float, seed: int) -> Run:
    """Return a training.

    Args:
        name: of the start.
        lr: learning rate.
        seed: of initial values, order and augmentation.
    """
    fields = {**STARTS[name].overrides, "optim.lr": lr}
    return Run("configs/finetuning.py", tuple(sorted(fields.items())), seed)


def chosen_lr(name: str, results: Mapping[str, dict]) -> float | None:
    """Return the learning rate with the best mask AP of seed 0, or None unless all were trained with.

    Args:
        name: of the start.
        results: by name of the run.
    """
    names = {finetuning_run(STARTS[name].searched, lr, 0).name: lr for lr in LEARNING_RATES}
    if not names.keys() <= results.keys():
        return None
    return names[max(names, key=lambda run: results[run]["curve"][-1]["segm_AP"])]
