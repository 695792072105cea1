"""One training step: losses, gradient, update.

The model is split once into its structure and a tree of arrays, and the step is a plain ``jax.jit`` over the arrays:
``nnx.jit`` would take the model apart again at every call. The batch is sharded along its first axis, and each device
computes the losses and gradients of its own rows. The devices exchange only the numbers that losses are divided by,
batch statistics, and the gradients, which are summed in float32; all of these are those of the whole batch. The state
is on every device, or divided among them between the steps.
"""

import ctypes
import functools
import logging
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from maskrcnn_jax.distributed import on_each_device, place_state, replicated
from maskrcnn_jax.errors import UserError, one_line
from maskrcnn_jax.models.mask_rcnn import MaskRCNN
from maskrcnn_jax.ops.devices import sum_over_devices
from maskrcnn_jax.options import MAX_LOSS_SCALE, MIN_LOSS_SCALE, OptimOptions
from maskrcnn_jax.structures import Batch
from maskrcnn_jax.training.optimizer import is_frozen

_log = logging.getLogger(__name__)


class LossScale(NamedTuple):
    """By what the loss is multiplied before it is differentiated in float16, whose smallest number is 6e-8.

    Many gradients are smaller or have few digits left there. The gradient of the parameters, in float32, is divided by
    the scale again. Source: Sec. 3.2, Mixed Precision Training; the dynamic scale is that of torch's GradScaler.
    """

    scale: jax.Array  # float32
    good_steps: jax.Array  # int32, since the scale last changed

    def after(self, finite: jax.Array, interval: int) -> "LossScale":
        """Return what the next step uses: half after a gradient that was not finite, twice after so many that were."""
        good_steps = jnp.where(finite, self.good_steps + 1, 0)
        grown = jnp.where(good_steps >= interval, jnp.minimum(self.scale * 2, MAX_LOSS_SCALE), self.scale)
        scale = jnp.where(finite, grown, jnp.maximum(self.scale / 2, MIN_LOSS_SCALE))
        return LossScale(scale, jnp.where(good_steps >= interval, 0, good_steps))


class TrainState(NamedTuple):
    """All that a step changes and a checkpoint holds."""

    step: jax.Array  # int32, steps done, skipped ones too
    params: nnx.State  # what the optimizer changes
    variables: nnx.State  # the other arrays of the model: statistics of norms
    opt_state: optax.OptState
    loss_scale: LossScale | None = None  # of models that compute in float16
    averaged: nnx.State | None = None  # params averaged over the steps, where this is wanted

    @property
    def inference_params(self) -> nnx.State:
        """What the model is evaluated with: the averaged parameters where there are any."""
        return self.params if self.averaged is None else self.averaged


def create_train_state(
    model: MaskRCNN,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    optim: OptimOptions,
    *,
    shard: bool = False,
) -> tuple[nnx.GraphDef, TrainState]:
    """Split a model into its structure, in training mode, and the state that steps change, on every device.

    Args:
        model: Is switched to training mode.
        optimizer: Of its parameters.
        mesh: Of the devices.
        optim: The batch norms of frozen stages keep their statistics and use them; with ``ema_decay`` the state holds
            an average of the parameters.
        shard: Shard the state over the devices instead of replicating it.
    """
    graphdef, state = split_train_state(model, optimizer, optim)
    return graphdef, place_state(state, mesh, shard=shard)


def split_train_state(
    model: MaskRCNN, optimizer: optax.GradientTransformation, optim: OptimOptions
) -> tuple[nnx.GraphDef, TrainState]:
    """Return what create_train_state returns before it is placed on devices; ``jax.eval_shape`` can call this.

    Raises:
        UserError: if stages are to be frozen that the backbone does not have.
    """
    model.train()
    frozen = [module for path, module in nnx.iter_modules(model) if is_frozen(path, optim.frozen_stages)]
    if optim.frozen_stages and not frozen:
        raise UserError(
            f"optim.frozen_stages is {optim.frozen_stages}, which freezes nothing of the backbone "
            f"{type(model.backbone).__name__}; give that a stem and a list of stages, or set it to 0"
        )
    for module in frozen:
        module.eval()
    graphdef, params, variables = nnx.split(model, nnx.Param, ...)  # type: ignore[misc]
    state = TrainState(jnp.zeros((), jnp.int32), params, variables, optimizer.init(params))
    if model.dtype == jnp.float16:
        state = state._replace(loss_scale=LossScale(jnp.float32(optim.loss_scale), jnp.zeros((), jnp.int32)))
    if optim.ema_decay:
        # Copied, because the step is given the memory of each array, once.
        state = state._replace(averaged=jax.tree.map(jnp.copy, params))
    return graphdef, state


def updates_done(state: TrainState) -> int:
    """Return how often the optimizer has changed the parameters: not in the steps that float16 skipped."""
    return max(int(count) for _, count in optax.tree_utils.tree_get_all_with_path(state.opt_state, "count"))


class TrainStep:
    """The compiled training step: one program for each size of the images, compiled when the first batch comes."""

    def __init__(
        self, graphdef: nnx.GraphDef, optimizer: optax.GradientTransformation, mesh: Mesh, optim: OptimOptions
    ):
        """Prepare.

        Args:
            graphdef: Structure of the model, from ``create_train_state``.
            optimizer: The same as there.
            mesh: The batch is sharded over it.
            optim: The same as there. With ``accumulate`` the gradient is the mean of those of the parts of a batch,
                each of which divides its losses by its own numbers of samples.
        """
        self._step = functools.partial(_step, graphdef, optimizer, mesh, optim)
        self._mesh = mesh
        self.programs: dict[tuple, jax.stages.Compiled] = {}

    def __call__(self, state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        """Take a step.

        Args:
            state: given up: its memory is reused.
            batch: sharded over the mesh; its size is a multiple of the mesh's times ``accumulate``.
            key: folded with the step, so that a resumed run draws what it would have drawn.

        Returns:
            The next state, and metrics as scalars on the device: the loss terms, their sum "loss", the model's metrics
            and the norm of the gradient, in which frozen stages do not count. In float16 also the "loss_scale" of this
            step, and "skipped": 1 where the loss or the gradient was not finite, so that nothing but the number of
            steps and the loss scale has changed.
        """
        self.compile(state, batch, key)
        return self.programs[_kind(batch)](state, batch, key)

    def compile(self, state: TrainState, batch: Batch, key: jax.Array) -> jax.stages.Compiled | None:
        """Make the program for such a batch and return it; nothing if there is one already."""
        if _kind(batch) in self.programs:
            return None
        try:
            program = self.lower(state, batch, key).compile()
        except jax.errors.JaxRuntimeError as error:
            if "No such compile option" not in str(error):
                raise
            _log.warning(
                "this version of XLA lacks an option (%s); the program is compiled without, and may need more time or "
                "memory",
                one_line(error),
            )
            program = self.lower(state, batch, key, tuned=False).compile()
        self.programs[_kind(batch)] = program
        give_back_memory()
        return program

    def lower(self, state: TrainState, batch: Batch, key: jax.Array, *, tuned: bool = True) -> jax.stages.Lowered:
        """Trace the step; the next state will lie on the devices as ``state`` does.

        Args:
            state: Or the shapes, dtypes and shardings of one, as for the other two.
            batch: As of a step.
            key: As of a step.
            tuned: Whether the program is compiled with ``compiler_options``.
        """
        layouts = jax.tree.map(lambda array: array.sharding, state), replicated(self._mesh)
        options = compiler_options(self._mesh) if tuned else {}
        step = jax.jit(self._step, donate_argnums=0, out_shardings=layouts, compiler_options=options)
        return step.lower(state, batch, key)


def compiler_options(mesh: Mesh) -> dict[str, str | bool]:
    """Return the options of XLA with which steps are compiled for these devices."""
    options: dict[str, dict[str, str | bool]] = {
        "cpu": {
            # The default order of operations takes more memory, for threads that have enough to do.
            "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
            # This pass would take the barriers away before operations are fused: relu's gradient would compute what it
            # needs from what the layer before had put out, which would have to be kept until then.
            "xla_disable_hlo_passes": "cse_barrier_expander",
        },
        "tpu": {
            # For a few images a chip, these passes cut maps into strips and copy them before and after each 3x3
            # convolution: a third of the memory traffic of a step.
            "xla_tpu_run_space_to_batch": False,
            "xla_tpu_run_space_to_batch_on_new_platforms": False,
        },
    }
    return options.get(mesh.devices.flat[0].platform, {})


def device_memory(program: jax.stages.Compiled) -> str:
    """Return what a program takes of the memory of each device, its arguments and results included, with the unit."""
    memory = program.memory_analysis()
    if memory is None:
        return "an unknown amount"  # not every kind of device tells
    arguments = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return f"{(arguments + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes) / 2**20:,.0f} MiB"


def _kind(batch):
    return tuple((array.shape, array.dtype) for array in jax.tree.leaves(batch))


def _step(graphdef, optimizer, mesh, optim, state, batch, key):
    key = jax.random.fold_in(key, state.step)
    # Where they are divided, parameters are put together once; devices would else meet wherever they are used.
    params = jax.lax.with_sharding_constraint(state.params, replicated(mesh))
    # Of frozen stages nothing is kept for a backward pass, computed in one, or added up over devices.
    frozen, trained = nnx.split_state(params, lambda path, _: is_frozen(path, optim.frozen_stages), ...)
    gradient: Callable = _gradient
    if optim.accumulate > 1:
        # Devices meet in every part: simulated ones, which could then wait for ever, get the parts without a loop.
        simulated = mesh.size > 1 and mesh.devices.flat[0].platform == "cpu"
        gradient = functools.partial(_mean_gradient, parts=optim.accumulate, unroll=simulated)

    def of_rows(shared, batch):
        gradients, variables, metrics = gradient(graphdef, *shared, batch)
        with jax.named_scope("sum_gradients"):
            # Without the barrier, XLA would add up in half precision what was computed in it.
            gradients = jax.lax.optimization_barrier(gradients)
            gradients, metrics = sum_over_devices((gradients, metrics))
        return gradients, variables, metrics

    scale = None if state.loss_scale is None else state.loss_scale.scale
    shared = trained, frozen, state.variables, scale, key
    gradients, variables, metrics = on_each_device(of_rows, mesh, returns_rows=False)(shared, batch)
    gradients = nnx.merge_state(gradients, jax.tree.map(jnp.zeros_like, frozen))
    if state.loss_scale is not None:
        gradients = jax.tree.map(lambda gradient: gradient / state.loss_scale.scale, gradients)
    with jax.named_scope("optimizer"):
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
    metrics["gradient_norm"] = optax.tree.norm(gradients)
    changed = state._replace(params=params, variables=variables, opt_state=opt_state)
    if state.averaged is not None:
        changed = changed._replace(averaged=_average(state.averaged, params, state.step, optim.ema_decay))
    if state.loss_scale is not None:
        finite = jnp.isfinite(metrics["loss"] + metrics["gradient_norm"])
        metrics |= {"loss_scale": state.loss_scale.scale, "skipped": 1 - finite.astype(jnp.float32)}
        changed = jax.tree.map(functools.partial(jnp.where, finite), changed, state)
        changed = changed._replace(loss_scale=state.loss_scale.after(finite, optim.loss_scale_interval))
    return changed._replace(step=state.step + 1), metrics


def _gradient(graphdef, params, frozen, variables, scale, key, batch):
    """Return the gradient of ``params``, the next variables and the metrics.

    Gradient and metrics are this device's shares. The gradient is multiplied by the loss scale if there is one.
    """

    def loss_fn(params):
        # Copied, because variables of an outer trace must not be changed inside the gradient's.
        model = nnx.merge(graphdef, params, frozen, variables, copy=True)
        terms, metrics = model.losses(batch, key)
        loss = sum(terms.values())
        objective = loss if scale is None else loss * scale
        return objective, (nnx.state(model, nnx.Not(nnx.Param)), terms | metrics | {"loss": loss})

    gradients, (variables, metrics) = jax.grad(loss_fn, has_aux=True)(params)
    return gradients, variables, metrics


def _mean_gradient(graphdef, params, frozen, variables, scale, key, batch, *, parts, unroll):
    """Return what ``_gradient`` returns, as the mean over the parts of the batch, worked on one after the other.

    Part p has the rows p, p + parts, p + 2 parts, ..., whatever the number of devices.
    """

    def visit(carry, part):
        total, variables = carry
        gradients, variables, metrics = _gradient(graphdef, params, frozen, variables, scale, *part)
        return (jax.tree.map(jnp.add, total, gradients), variables), metrics

    def cut(rows):
        return jnp.moveaxis(rows.reshape(-1, parts, *rows.shape[1:]), 1, 0)

    start = jax.tree.map(jnp.zeros_like, params), variables
    inputs = jax.random.split(key, parts), jax.tree.map(cut, batch)
    (total, variables), metrics = jax.lax.scan(visit, start, inputs, unroll=unroll)
    gradients = jax.tree.map(lambda array: array / parts, total)
    return gradients, variables, jax.tree.map(lambda values: values.mean(axis=0), metrics)


def _average(averaged, params, step, decay):
    """Move the average towards the parameters; faster at first, when it still holds initial values."""
    decay = jnp.minimum(decay, (1 + step) / (10 + step))
    # In this form, unlike optax.incremental_update's, parameters that never change are their own average to the bit.
    return jax.tree.map(lambda old, new: old + (1 - decay).astype(old.dtype) * (new - old), averaged, params)


def give_back_memory() -> None:
    """Return freed memory to the system, which glibc would keep: half a gigabyte of the compiler's at full width.

    The fragments that evaluations leave would otherwise add up to 12 MB each.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
