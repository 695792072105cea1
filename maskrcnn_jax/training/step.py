"""One training step: losses, gradient, update.

The model is split once into its structure and a tree of arrays, and the step is a plain ``jax.jit`` over the arrays:
``nnx.jit`` would take the model apart again at every call. The batch is sharded along its first axis and the state is
replicated; XLA inserts the sums across devices, so losses and batch statistics are those of the whole batch.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from maskrcnn_jax.sharding import replicated
from maskrcnn_jax.structures import Batch


class TrainState(NamedTuple):
    """All that a step changes and a checkpoint holds."""

    step: jax.Array  # int32, steps done
    params: nnx.State  # what the optimizer changes
    variables: nnx.State  # the other arrays of the model: statistics of norms
    opt_state: optax.OptState


def create_train_state(
    model: nnx.Module, optimizer: optax.GradientTransformation, mesh: Mesh
) -> tuple[nnx.GraphDef, TrainState]:
    """Split a model into its structure, in training mode, and the state that steps change, on every device."""
    model.train()
    graphdef, params, variables = nnx.split(model, nnx.Param, ...)
    state = TrainState(jnp.zeros((), jnp.int32), params, variables, optimizer.init(params))
    return graphdef, jax.device_put(state, replicated(mesh))


def make_train_step(
    graphdef: nnx.GraphDef, optimizer: optax.GradientTransformation, mesh: Mesh
) -> Callable[[TrainState, Batch, jax.Array], tuple[TrainState, dict[str, jax.Array]]]:
    """Compile the training step.

    Args:
      graphdef: structure of the model, as create_train_state returns it.
      optimizer: the same as there.
      mesh: over which the batch is sharded.

    Returns:
      step(state, batch, key) -> (state, metrics). The state passed in is given up: its memory is reused. The key is
      folded with the step, so that a resumed run draws what it would have drawn. Metrics are scalars on the device:
      the loss terms, their sum "loss", the model's metrics and the norm of the gradient.
    """

    def loss_fn(params, variables, batch, key):
        # Copied, because variables of an outer trace must not be changed inside the gradient's.
        model = nnx.merge(graphdef, params, variables, copy=True)
        terms, metrics = model.losses(batch, key)
        loss = sum(terms.values())
        variables = nnx.state(model, nnx.Not(nnx.Param))
        return loss, (terms | metrics | {"loss": loss}, variables)

    def step(state, batch, key):
        key = jax.random.fold_in(key, state.step)
        gradient = jax.grad(loss_fn, has_aux=True)
        gradients, (metrics, variables) = gradient(state.params, state.variables, batch, key)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics["gradient_norm"] = optax.tree.norm(gradients)
        return TrainState(state.step + 1, params, variables, opt_state), metrics

    return jax.jit(step, donate_argnums=0, out_shardings=replicated(mesh))
