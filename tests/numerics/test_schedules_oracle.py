"""Learning rates against torch's schedulers and detectron2's formula, at every step of a full run, in float64."""

import bisect
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import ChainedScheduler, CosineAnnealingLR, LinearLR, MultiStepLR, SequentialLR

from maskrcnn_jax.options import OptimOptions
from maskrcnn_jax.training.optimizer import make_schedule

STEPS, WARMUP, FACTOR, LR = 90_000, 1000, 0.001, 0.02  # detectron2's 1x schedule
MILESTONES, GAMMA = (60_000, 80_000), 0.1
MULTISTEP = {"schedule": "multistep", "milestones": MILESTONES, "milestone_unit": "steps", "gamma": GAMMA}


def ours(float64=True, **changes):
    optim = OptimOptions(**({"lr": LR, "warmup_steps": WARMUP, "warmup_factor": FACTOR} | changes))
    with jax.enable_x64(float64):
        return np.asarray(jax.jit(jax.vmap(make_schedule(optim, STEPS, 1)))(jnp.arange(STEPS)))


def torchs(make_scheduler):
    """Return the learning rates of a scheduler, which is stepped after every step of the optimizer."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=LR)
    scheduler, rates = make_scheduler(optimizer), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the optimizer takes no steps
        for _ in range(STEPS):
            rates.append(optimizer.param_groups[0]["lr"])
            scheduler.step()
    return np.array(rates)


def linear(optimizer):
    return LinearLR(optimizer, start_factor=FACTOR, total_iters=WARMUP)


def sequential(make_second):
    def make(optimizer):
        # Made in this order: each scheduler sets the learning rate of the first step.
        return SequentialLR(optimizer, [linear(optimizer), make_second(optimizer)], milestones=[WARMUP])

    return make


def chained(make_second):
    return lambda optimizer: ChainedScheduler([linear(optimizer), make_second(optimizer)])


def shifted_multistep(optimizer):
    """Count milestones from the end of warm-up, as SequentialLR does."""
    return MultiStepLR(optimizer, [milestone - WARMUP for milestone in MILESTONES], GAMMA)


CASES = {
    "multistep, sequential": (MULTISTEP, sequential(shifted_multistep)),
    "multistep, chained": (MULTISTEP, chained(lambda optimizer: MultiStepLR(optimizer, MILESTONES, GAMMA))),
    # torchvision's references/classification
    "cosine, sequential": (
        {"final_lr_fraction": 0.01},
        sequential(lambda optimizer: CosineAnnealingLR(optimizer, STEPS - WARMUP, eta_min=0.01 * LR)),
    ),
    # torchvision's references/detection, where both schedulers change the same optimizer
    "cosine, chained": (
        {"warmup_kind": "chained"},
        chained(lambda optimizer: CosineAnnealingLR(optimizer, STEPS)),
    ),
    "constant": ({"schedule": "constant"}, linear),
}


@pytest.mark.parametrize("case", CASES)
def test_every_step_has_the_learning_rate_of_torchs_schedulers(case):
    options, make_scheduler = CASES[case]
    # Torch multiplies from step to step: after 90,000 steps of a cosine the rounding has grown to 1e-13 of the peak.
    np.testing.assert_allclose(ours(**options), torchs(make_scheduler), rtol=0, atol=1e-12)


def detectron2s(multiplier):
    """Return WarmupParamScheduler's learning rates: a line from FACTOR to the multiplier at the end of warm-up."""
    where = np.arange(STEPS) / STEPS
    rates = np.array([multiplier(share) for share in where])
    part = where[:WARMUP] * STEPS / WARMUP
    rates[:WARMUP] = multiplier(WARMUP / STEPS) * part + FACTOR * multiplier(0.0) * (1 - part)
    return LR * rates


def multistep_multiplier(where):
    """Return MultiStepParamScheduler's value, which counts steps with a small tolerance."""
    return GAMMA ** bisect.bisect_right(MILESTONES, int((where + 1e-6) * STEPS))


def cosine_multiplier(where):
    return 0.5 * (1 + math.cos(math.pi * where))


@pytest.mark.parametrize("kind", ["sequential", "chained", "detectron2"])
def test_every_step_has_the_learning_rate_of_detectron2s_multistep(kind):
    rates = ours(**MULTISTEP, warmup_kind=kind)
    np.testing.assert_allclose(rates, detectron2s(multistep_multiplier), rtol=0, atol=1e-12)


def test_every_step_has_the_learning_rate_of_detectron2s_cosine():
    rates = ours(warmup_kind="detectron2")
    np.testing.assert_allclose(rates, detectron2s(cosine_multiplier), rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [MULTISTEP, {}, {"warmup_kind": "chained"}, {"warmup_kind": "detectron2"}])
def test_the_float32_of_a_step_is_that_of_float64_but_for_rounding(options):
    # The cosine of a float32 angle is off by 1e-7; relative to a rate near zero at the end this is more.
    single, double = ours(float64=False, **options), ours(**options)
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, double, rtol=0, atol=2e-7 * LR)
    if options is MULTISTEP:
        np.testing.assert_array_equal(single[WARMUP:], double[WARMUP:].astype(np.float32))
