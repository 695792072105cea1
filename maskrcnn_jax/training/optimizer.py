"""AdamW or SGD with linear warm-up, cosine decay and gradient clipping (the paper, Sec. 3.2, has AdamW)."""

import jax
import optax
from flax import nnx

from maskrcnn_jax.errors import UserError
from maskrcnn_jax.options import OptimOptions


def make_schedule(optim: OptimOptions, num_steps: int) -> optax.Schedule:
    """Return the learning rate as a function of the step.

    The warm-up is cut to a tenth of a short run.

    Args:
        optim: Options of the optimizer.
        num_steps: Steps of the whole run.

    Raises:
        UserError: if there are no steps.
    """
    if num_steps < 1:
        raise UserError(f"the run has {num_steps} steps; set epochs to at least 1")
    warmup_steps = min(optim.warmup_steps, num_steps // 10)
    return optax.warmup_cosine_decay_schedule(
        init_value=optim.lr / 1000 if warmup_steps else optim.lr,
        peak_value=optim.lr,
        warmup_steps=warmup_steps,
        decay_steps=num_steps,
        end_value=optim.lr * optim.final_lr_fraction,
    )


def is_decayed(params: nnx.State) -> nnx.State:
    """Return a tree of bool: True for kernels, False for biases and the scales of norms (arrays of one axis)."""
    return jax.tree.map(lambda array: array.ndim > 1, params)


def is_frozen(path: tuple[object, ...], frozen_stages: int) -> bool:
    """Return whether a parameter or module is in the first stages of MaskRCNN's backbone; the stem is the first."""
    match path:
        case ("backbone", "stem", *_):
            return frozen_stages >= 1
        case ("backbone", "stages", int(stage), *_):
            return frozen_stages >= stage + 2
    return False


def make_optimizer(optim: OptimOptions, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Build the optimizer.

    Args:
        optim: Its options.
        schedule: The learning rate as a function of the step.
    """
    mask = None if optim.decay_norm_and_bias else is_decayed
    if optim.kind == "adamw":
        optimizer = optax.adamw(schedule, b1=optim.b1, b2=optim.b2, weight_decay=optim.weight_decay, mask=mask)
    else:
        decay = optax.add_decayed_weights(optim.weight_decay, mask)
        optimizer = optax.chain(decay, optax.sgd(schedule, momentum=optim.momentum))
    if optim.clip_norm:
        optimizer = optax.chain(optax.clip_by_global_norm(optim.clip_norm), optimizer)
    if optim.frozen_stages:

        def labels(params):
            return nnx.map_state(lambda path, _: is_frozen(path, optim.frozen_stages), params)

        optimizer = optax.partition({False: optimizer, True: optax.set_to_zero()}, labels)
    return optimizer
