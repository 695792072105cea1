"""The compiled step under its options."""

import jax
import numpy as np
import optax
import pytest

from maskrcnn_jax.sharding import make_mesh, shard_batch
from maskrcnn_jax.training.step import TrainStep, create_train_state
from tests.models.tiny import tiny_batch, tiny_model


def take_step(**options):
    """Return the state after a step, its metrics, and how many values are kept from being shared in the program."""
    mesh, optimizer = make_mesh(), optax.sgd(1e-3)
    graphdef, state = create_train_state(tiny_model(**options), optimizer, mesh)
    train_step = TrainStep(graphdef, optimizer, mesh)
    arguments = (state, shard_batch(tiny_batch(batch_size=8), mesh), jax.random.key(0))
    barriers = train_step._step.lower(*arguments).as_text().count("optimization_barrier")
    return *train_step(*arguments), barriers


@pytest.mark.slow
def test_recomputing_every_block_in_the_gradient_changes_no_value():
    state, metrics, barriers = take_step(norm="batch")
    again, its_metrics, its_barriers = take_step(norm="batch", remat=True)
    # XLA's CPU compiler still computes nothing twice, so the memory that this saves elsewhere cannot be seen here.
    assert its_barriers == barriers + 8
    assert metrics["loss"] == pytest.approx(float(its_metrics["loss"]), rel=1e-5)
    for ours, expected in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-6)
