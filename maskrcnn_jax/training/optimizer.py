"""AdamW or SGD with warm-up, a schedule of the learning rate and gradient clipping (the paper, Sec. 3.2: AdamW)."""

import functools
import logging

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from maskrcnn_jax.errors import UserError
from maskrcnn_jax.options import OptimOptions

_log = logging.getLogger(__name__)


def make_schedule(optim: OptimOptions, num_steps: int, steps_per_epoch: int) -> optax.Schedule:
    """Return the learning rate as a function of the step, from 0.

    The warm-up is cut to a tenth of a short run.

    Args:
        optim: Options of the optimizer.
        num_steps: Steps of the whole run.
        steps_per_epoch: Steps of an epoch, for milestones in epochs.

    Raises:
        UserError: if there are no steps, or a milestone is in the warm-up.
    """
    if num_steps < 1:
        raise UserError(f"the run has {num_steps} steps; set epochs to at least 1")
    warmup_steps = min(optim.warmup_steps, num_steps // 10)
    decay = _make_decay(optim, num_steps, steps_per_epoch, warmup_steps)

    def schedule(step):
        rate = decay(step)
        first = last = optim.lr  # of the warm-up, but for warmup_factor
        if optim.warmup_kind == "chained":
            first = last = rate
        elif optim.warmup_kind == "detectron2":
            last = decay(warmup_steps)
        warmup = optax.linear_schedule(first * optim.warmup_factor, last, warmup_steps)
        return jnp.where(step < warmup_steps, warmup(step), rate)

    return schedule


def _make_decay(optim: OptimOptions, num_steps: int, steps_per_epoch: int, warmup_steps: int) -> optax.Schedule:
    """Return the learning rate without warm-up."""
    if optim.milestones and optim.schedule != "multistep":
        _log.warning("optim.milestones %s are not used by optim.schedule %s", optim.milestones, optim.schedule)
    if optim.schedule == "constant":
        return optax.constant_schedule(optim.lr)
    if optim.schedule == "cosine":
        start = warmup_steps if optim.warmup_kind == "sequential" else 0
        cosine = optax.cosine_decay_schedule(optim.lr, num_steps - start, alpha=optim.final_lr_fraction)
        return lambda step: cosine(step - start)
    unit = steps_per_epoch if optim.milestone_unit == "epochs" else 1
    milestones = [int(milestone) * unit for milestone in optim.milestones]
    if milestones[0] < warmup_steps:
        raise UserError(
            f"the first of optim.milestones {optim.milestones} ({optim.milestone_unit}) is at step {milestones[0]}, "
            f"during warm-up; move it to step {warmup_steps} or later"
        )
    if milestones[-1] >= num_steps:  # as in a trial run of a few steps
        _log.warning(
            "the last of optim.milestones %s (%s) is at step %d, but the run ends at step %d, so the learning rate is "
            "lowered less often",
            *(optim.milestones, optim.milestone_unit, milestones[-1], num_steps),
        )
    rates = [optim.lr * optim.gamma**passed for passed in range(len(milestones) + 1)]
    return lambda step: jnp.asarray(rates)[jnp.searchsorted(jnp.asarray(milestones), step, side="right")]


def is_decayed(optim: OptimOptions, params: nnx.State) -> nnx.State:
    """Return a tree of bool: which parameters have weight decay.

    A norm is a module with a parameter ``scale``; a bias is a parameter whose name ends with ``bias``.
    """
    norms = {_names(path)[:-1] for path, _ in jax.tree.leaves_with_path(params) if _names(path)[-1] == "scale"}

    def decayed(path, _):
        *module, name = _names(path)
        if tuple(module) in norms:
            return optim.decay_norms
        return optim.decay_biases or not name.endswith("bias")

    return jax.tree.map_with_path(decayed, params)


def _names(path: tuple) -> tuple:
    """Return the names of modules, and of the parameter, on the path to an array."""
    return tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))


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
    # Without a mask the state has another structure, which checkpoints of runs that decay everything have.
    mask = None if optim.decay_norms and optim.decay_biases else functools.partial(is_decayed, optim)
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
    return optimizer if optim.backbone_lr_factor == 1 else _scale_backbone(optimizer, optim.backbone_lr_factor)


def _scale_backbone(optimizer: optax.GradientTransformation, factor: float) -> optax.GradientTransformation:
    """Multiply the updates of the backbone, weight decay included, as a parameter group of its own in torch.

    The state is that of the optimizer alone, so that a run may go on with another factor.
    """

    def update(gradients, state, params=None):
        updates, state = optimizer.update(gradients, state, params)

        def scale(path, update):
            return update * factor if _names(path)[0] == "backbone" else update

        return jax.tree.map_with_path(scale, updates), state

    return optax.GradientTransformation(optimizer.init, update)
