"""A network of one layer and its training, where the whole network is not what is tested."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from maskrcnn_jax.distributed import make_mesh, shard_batch
from maskrcnn_jax.models.layers import BatchNorm, Conv
from maskrcnn_jax.models.losses import masked_mean
from maskrcnn_jax.ops.devices import sum_over_devices
from maskrcnn_jax.options import OptimOptions
from maskrcnn_jax.training.step import TrainStep, create_train_state


class Points(NamedTuple):
    """What the small network is trained on."""

    x: np.ndarray  # [B, 1, 1, 3]
    y: np.ndarray  # [B, 1, 1, 4]


class Layer(nnx.Module):
    """A convolution with trained statistics, and the squared distance of its output from what is wanted."""

    def __init__(self, dtype, *, normalized=True):
        self.dtype = jnp.dtype(dtype)
        self.conv = Conv(3, 4, 1, dtype=self.dtype, rngs=nnx.Rngs(0))
        self.norm = BatchNorm(4, dtype=self.dtype) if normalized else None

    def losses(self, batch, key):
        x = self.conv(batch.x)
        x = x if self.norm is None else self.norm(x)
        distance = jnp.square(x.astype(jnp.float32) - batch.y)
        loss = masked_mean(distance, jnp.ones(distance.shape, bool))
        return {"loss_y": loss}, {"draw": jax.random.uniform(key) / sum_over_devices(jnp.ones(()))}


def points(batch_size=8, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (batch_size, 1, 1, 3), (batch_size, 1, 1, 4)
    return Points(*(rng.normal(size=shape).astype(np.float32) for shape in shapes))


class Training:
    """A state and the step that changes it."""

    def __init__(self, dtype="float16", *, optimizer=None, normalized=True, devices=8, shard=False, **options):
        self.mesh = make_mesh(jax.devices()[:devices])
        optimizer = optimizer or optax.adamw(optax.linear_schedule(0.1, 0.0, 100))
        model, optim = Layer(dtype, normalized=normalized), OptimOptions(**options)
        graphdef, self.state = create_train_state(model, optimizer, self.mesh, optim, shard=shard)
        self.train_step = TrainStep(graphdef, optimizer, self.mesh, optim)

    def step(self, batch):
        """Take a step; returns its metrics."""
        self.state, metrics = self.train_step(self.state, shard_batch(batch, self.mesh), jax.random.key(0))
        return {name: float(value) for name, value in metrics.items()}

    def arrays(self, *fields):
        """Return copies of the arrays of the state, or of these fields."""
        chosen = [getattr(self.state, field) for field in fields or self.state._fields]
        return [np.array(leaf) for leaf in jax.tree.leaves(chosen)]


def assert_same(ours, expected):
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_array_equal(a, b)
