"""The optimizer of most tests."""

from maskrcnn_jax.training.optimizer import make_optimizer, make_schedule


def optimizer(num_steps: int = 10, **options):
    """Return the optimizer of most runs, for a run of a few steps."""
    schedule = make_schedule(lr=1e-3, warmup_steps=0, final_lr_fraction=0.0, num_steps=num_steps)
    defaults = {"kind": "adamw", "weight_decay": 1e-4, "decay_norm_and_bias": False, "b1": 0.9, "b2": 0.999}
    defaults |= {"momentum": 0.9, "clip_norm": 1.0, "frozen_stages": 0}
    return make_optimizer(schedule, **(defaults | options))
