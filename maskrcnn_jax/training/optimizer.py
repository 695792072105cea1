"""AdamW or SGD with linear warm-up, cosine decay and clipping by global norm; the paper (Sec. 3.2) has AdamW."""

from collections.abc import Hashable

import jax
import optax
from flax import nnx

from maskrcnn_jax.errors import UserError


def make_schedule(*, lr: float, warmup_steps: int, final_lr_fraction: float, num_steps: int) -> optax.Schedule:
    """Return the learning rate as a function of the step.

    Args:
      lr: peak.
      warmup_steps: linear rise from lr / 1000; cut to a tenth of the run where the run is short.
      final_lr_fraction: of the peak, reached at the last step.
      num_steps: of the whole run.

    Raises:
      UserError: when the rate or the number of steps is no positive number.
    """
    if not (0 < lr < float("inf") and num_steps >= 1):
        raise UserError(f"optim.lr {lr} and the number of steps {num_steps} must be positive numbers; change them")
    warmup_steps = min(warmup_steps, num_steps // 10)
    return optax.warmup_cosine_decay_schedule(
        init_value=lr / 1000 if warmup_steps else lr,
        peak_value=lr,
        warmup_steps=warmup_steps,
        decay_steps=num_steps,
        end_value=lr * final_lr_fraction,
    )


def is_decayed(params: nnx.State) -> nnx.State:
    """Return a tree of bool: True for the kernels, False for biases and the scales of norms (arrays of one axis)."""
    return jax.tree.map(lambda array: array.ndim > 1, params)


def is_frozen(path: tuple[Hashable, ...], frozen_stages: int) -> bool:
    """Return whether a parameter or module is in the first stages of the backbone of MaskRCNN, the stem being one."""
    match path:
        case ("backbone", "stem", *_):
            return frozen_stages >= 1
        case ("backbone", "stages", int(stage), *_):
            return frozen_stages >= stage + 2
    return False


def make_optimizer(
    schedule: optax.Schedule,
    *,
    kind: str,
    weight_decay: float,
    decay_norm_and_bias: bool,
    b1: float,
    b2: float,
    momentum: float,
    clip_norm: float,
    frozen_stages: int,
) -> optax.GradientTransformation:
    """Build the optimizer; ``configs/base.py`` says what the arguments mean.

    Raises:
      UserError: for an unknown kind.
    """
    mask = None if decay_norm_and_bias else is_decayed
    if kind == "adamw":
        optimizer = optax.adamw(schedule, b1=b1, b2=b2, weight_decay=weight_decay, mask=mask)
    elif kind == "sgd":
        decay = optax.add_decayed_weights(weight_decay, mask)
        optimizer = optax.chain(decay, optax.sgd(schedule, momentum=momentum))
    else:
        raise UserError(f"optim.kind is {kind!r}; use 'adamw' or 'sgd'")
    if clip_norm:
        optimizer = optax.chain(optax.clip_by_global_norm(clip_norm), optimizer)
    if frozen_stages:

        def labels(params):
            return nnx.map_state(lambda path, _: is_frozen(path, frozen_stages), params)

        optimizer = optax.partition({False: optimizer, True: optax.set_to_zero()}, labels)
    return optimizer
