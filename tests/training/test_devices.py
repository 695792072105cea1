"""Five steps on one, two, four and eight simulated devices, with statistics of normalisation over all of them."""

import jax
import numpy as np
import optax
import pytest

from maskrcnn_jax import distributed
from maskrcnn_jax.distributed import make_mesh, shard_batch
from maskrcnn_jax.options import OptimOptions
from maskrcnn_jax.training.step import TrainStep, create_train_state
from tests.models.tiny import tiny_batch, tiny_model
from tests.programs import collectives_in_loops

STEPS = 5


def train(num_devices, optimizer, *, dtype, side, shard=False):
    """Return the losses, and the parameters and statistics after the last step."""
    mesh = make_mesh(jax.devices()[:num_devices])
    graphdef, state = create_train_state(
        tiny_model(norm="batch", dtype=dtype), optimizer, mesh, OptimOptions(), shard=shard
    )
    train_step = TrainStep(graphdef, optimizer, mesh, OptimOptions())
    batch = shard_batch(tiny_batch(batch_size=8, side=side, seed=1), mesh)
    program = train_step.compile(state, batch, jax.random.key(0))
    assert collectives_in_loops(program.as_text()) == [], "devices with too few threads could wait for ever"
    losses = []
    for _ in range(STEPS):
        state, metrics = train_step(state, batch, jax.random.key(0))
        losses.append(float(metrics["loss"]))
    return losses, [np.asarray(array) for array in jax.tree.leaves((state.params, state.variables))]


def assert_same_on_all_numbers_of_devices(monkeypatch, tolerance, *options, **more):
    expected_losses, expected = train(1, *options, **more)
    assert len(set(expected_losses)) == STEPS, "nothing is trained"
    for num_devices, slices in ((2, 1), (4, 1), (8, 1), (8, 2)):
        # Devices of slices that alternate: the rows of the batch lie on the devices in another order.
        monkeypatch.setattr(distributed, "_slice", lambda device, slices=slices: device.id % slices)
        losses, arrays = train(num_devices, *options, **more, shard=num_devices == 4)
        np.testing.assert_allclose(losses, expected_losses, rtol=tolerance)
        for ours, theirs in zip(arrays, expected, strict=True):
            assert np.abs(ours - theirs).max(initial=0) <= tolerance * max(np.abs(theirs).max(initial=0), 1e-3)


@pytest.mark.slow
def test_float64_trains_alike_on_any_number_of_devices(monkeypatch):
    with jax.enable_x64(True):
        assert_same_on_all_numbers_of_devices(monkeypatch, 1e-10, optax.adamw(1e-3), dtype="float64", side=32)


# Larger steps, or another batch (3 of 8), let the rounding of a sum decide which of two equally good boxes is kept.
# AdamW divides gradients that are all rounding by their own size. float64 shows both to be no more than rounding.
@pytest.mark.slow
def test_float32_trains_alike_on_any_number_of_devices(monkeypatch):
    assert_same_on_all_numbers_of_devices(monkeypatch, 1e-5, optax.sgd(1e-4, 0.9), dtype="float32", side=64)
