"""One training step: losses, gradient, update.

The model is split once into its structure and a tree of arrays, and the step is a plain ``jax.jit`` over the arrays:
``nnx.jit`` would take the model apart again at every call. The batch is sharded along its first axis and the state is
replicated; XLA inserts the sums across devices, so losses and batch statistics are those of the whole batch.
"""

import ctypes
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from maskrcnn_jax.sharding import replicated
from maskrcnn_jax.structures import Batch
from maskrcnn_jax.training.program_cache import ProgramCache, programs_from_jax, step_key


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


class TrainStep:
    """The compiled training step: a program for each size of the images, made when the first of this size comes."""

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        optimizer: optax.GradientTransformation,
        mesh: Mesh,
        cache: ProgramCache | None = None,
    ):
        """Prepare.

        Args:
          graphdef: structure of the model, as create_train_state returns it.
          optimizer: the same as there.
          mesh: over which the batch is sharded.
          cache: of compiled programs, for the entry points: it knows the sources of this package, but not what was
            put in the place of one of its functions.
        """
        step = functools.partial(_step, graphdef, optimizer)
        self._step = jax.jit(step, donate_argnums=0, out_shardings=replicated(mesh))
        # XLA's default order of operations on CPUs takes a quarter more memory, for threads that have enough to do.
        on_cpu = mesh.devices.flat[0].platform == "cpu"
        self._options = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"} if on_cpu else {}
        self._key = functools.partial(step_key, graphdef, optimizer, mesh, self._options)
        self._mesh, self._cache = mesh, cache
        self.programs: dict[tuple, jax.stages.Compiled] = {}

    def __call__(self, state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        """Take a step.

        Args:
          state: given up: its memory is reused.
          batch: sharded over the mesh.
          key: folded with the step, so that a resumed run draws what it would have drawn.

        Returns:
          The next state, and metrics as scalars on the device: the loss terms, their sum "loss", the model's metrics
          and the norm of the gradient.
        """
        kind = tuple((array.shape, array.dtype) for array in jax.tree.leaves(batch))
        if kind not in self.programs:
            self.programs[kind] = self._program(state, batch, key)
            _give_back_memory()
        return self.programs[kind](state, batch, key)

    def _program(self, *arguments) -> jax.stages.Compiled:
        name = self._key(arguments) if self._cache else None
        program = self._cache.load(name, self._mesh) if name else None
        if program is None:
            with programs_from_jax() as taken:
                program = self._step.lower(*arguments).compile(self._options)
            if name and not taken:
                self._cache.save(name, program)
        return program


def _step(graphdef, optimizer, state, batch, key):
    def loss_fn(params):
        # Copied, because variables of an outer trace must not be changed inside the gradient's.
        model = nnx.merge(graphdef, params, state.variables, copy=True)
        terms, metrics = model.losses(batch, jax.random.fold_in(key, state.step))
        loss = sum(terms.values())
        variables = nnx.state(model, nnx.Not(nnx.Param))
        return loss, (terms | metrics | {"loss": loss}, variables)

    gradients, (metrics, variables) = jax.grad(loss_fn, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics["gradient_norm"] = optax.tree.norm(gradients)
    return TrainState(state.step + 1, params, variables, opt_state), metrics


def _give_back_memory() -> None:
    """Return what the compiler has freed to the system, half a gigabyte at full width, which glibc would keep."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
