"""What is compared: where training starts from, what of the backbone is trained, and how images are augmented."""

from typing import NamedTuple

from tools.paper.experiments import Claim, Run

_FROZEN = {"optim.frozen_stages": 5}
_LARGE_SCALE_JITTER = {"data.crop_size": 256, "data.scale_jitter": (0.1, 2.0)}
_COPY_PASTE = {"data.copy_paste": 1.0}


class Recipe(NamedTuple):
    """What the backbone starts from, and what differs from configs/finetuning.py."""

    pretrained: bool
    overrides: dict[str, object]


_RANDOM, _PRETRAINED = "random weights", "pretrained"
_SLOWER, _KEPT = f"{_PRETRAINED}, a tenth of the rate", f"{_PRETRAINED}, frozen"
_JITTERED, _PASTED = f"{_KEPT}; large-scale jitter", f"{_KEPT}; large-scale jitter and copy-paste"
RECIPES = {
    # A frozen norm of random weights would normalise nothing, so from random weights the norms are trained.
    _RANDOM: Recipe(False, {"model.norm": "batch", "model.norm_eps": 1e-5}),
    _PRETRAINED: Recipe(True, {}),
    _SLOWER: Recipe(True, {"optim.backbone_lr_factor": 0.1}),
    _KEPT: Recipe(True, _FROZEN),
    _JITTERED: Recipe(True, _FROZEN | _LARGE_SCALE_JITTER),
    _PASTED: Recipe(True, _FROZEN | _LARGE_SCALE_JITTER | _COPY_PASTE),
}
CLAIMS = (
    Claim("Pretrained weights improve mask AP", _PRETRAINED, _RANDOM, "segm_AP"),
    Claim("A tenth of the learning rate for the backbone improves it", _SLOWER, _PRETRAINED, "segm_AP"),
    Claim("Freezing the backbone improves it", _KEPT, _PRETRAINED, "segm_AP"),
    Claim("Large-scale jitter improves it", _JITTERED, _KEPT, "segm_AP"),
    Claim("Copy-paste on top of the jitter improves it", _PASTED, _JITTERED, "segm_AP"),
)
PICTURED = (_RANDOM, _PRETRAINED, _KEPT)


def finetuning_run(name: str, seed: int) -> Run:
    """Return a training.

    Args:
        name: of the recipe.
        seed: of initial values, order and augmentation.
    """
    return Run("configs/finetuning.py", tuple(sorted(RECIPES[name].overrides.items())), seed)
