"""The optimizer of most tests."""

import optax

from maskrcnn_jax.options import OptimOptions
from maskrcnn_jax.training.optimizer import make_optimizer, make_schedule


def optimizer(optim: OptimOptions | None = None) -> optax.GradientTransformation:
    """Return the optimizer of a run of a few steps."""
    optim = optim or OptimOptions(lr=1e-3, warmup_steps=0)
    return make_optimizer(optim, make_schedule(optim, num_steps=10, steps_per_epoch=1))
