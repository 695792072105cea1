"""Devices and processes: the mesh, how arrays and work are divided on it, and how processes find each other."""

import json
import os
import sys
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from maskrcnn_jax.errors import UserError, one_line
from maskrcnn_jax.ops.devices import DATA_AXIS
from maskrcnn_jax.structures import Batch

# Set by a launcher for each process that it starts: how many there are. JAX finds the rest there by itself.
_LAUNCHERS = {"SLURM_NTASKS": "SLURM_STEP_NODELIST", "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK"}


def join(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    search: bool = False,
) -> None:
    """Join the other processes of this job, before anything else is asked of JAX; alone, do nothing.

    Processes that ``srun``, ``mpirun`` or GKE's TPU slices started find each other by themselves.

    Args:
        coordinator_address: host:port of process 0.
        num_processes: of the job.
        process_id: of this one, from 0.
        search: let JAX look for the others, as on the workers of a Cloud TPU.

    Raises:
        UserError: when some of the first three are given and others not, or the others cannot be reached.
    """
    given = (coordinator_address, num_processes, process_id)
    if any(value is not None for value in given):
        if coordinator_address is None or num_processes is None or process_id is None:
            raise UserError("give all of coordinator_address, num_processes and process_id, or none of them")
        if not 0 <= process_id < num_processes:
            raise UserError(
                f"process_id is {process_id}; with num_processes {num_processes} use 0 to {num_processes - 1}"
            )
    elif not search and not _launched():
        return
    try:
        jax.distributed.initialize(coordinator_address, num_processes, process_id)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the other processes cannot be joined ({one_line(error)}); check that all were started and "
            "can reach the first (at coordinator_address, if it was given)"
        ) from None


def _launched() -> bool:
    """Return whether a launcher, or GKE on the hosts of a TPU slice, started this process beside others."""
    if "," in os.environ.get("TPU_WORKER_HOSTNAMES", ""):
        return True
    return any(int(os.environ.get(number) or 1) > 1 and own in os.environ for number, own in _LAUNCHERS.items())


def is_first() -> bool:
    """Return whether this process is the one that prints and writes what there should be once."""
    return jax.process_index() == 0


def leave(status: int) -> None:
    """End this process; one of several at once: JAX would first wait for the others, who wait for this one."""
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def gather(value) -> list:
    """Return the values of all processes, in their order, to each of them; all must call this together.

    Args:
        value: of this process; anything that JSON holds.
    """
    if jax.process_count() == 1:
        return [value]
    content = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(content)))
    padded = np.zeros(lengths.max(), np.uint8)
    padded[: len(content)] = content
    contents = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(row[:length])) for row, length in zip(contents, lengths, strict=True)]


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return a mesh with one axis, "data", of these devices; by default of all devices of all processes.

    The devices of a process are neighbours on it, and so are those of a slice, whatever the number of TPU slices or
    GPU nodes. ``jax.make_mesh`` would refuse several slices or nodes, and its order depends on the kind of device.
    """
    devices = jax.devices() if devices is None else devices
    ordered = sorted(devices, key=lambda device: (_slice(device), device.process_index, device.id))
    # Auto: under the default, Explicit, a gather along the sharded batch axis is an error.
    return Mesh(np.array(ordered), (DATA_AXIS,), axis_types=(AxisType.Auto,))


def _slice(device: jax.Device) -> int:
    """Return the slice of a TPU, or the group of GPUs that are linked directly; 0 where there is no such thing."""
    return getattr(device, "slice_index", None) or 0


def process_rank(mesh: Mesh) -> int:
    """Return the place of this process in the mesh, from 0, and so which share of each batch it loads.

    This is the index of the process, unless the processes are numbered across slices.
    """
    order = list(dict.fromkeys(device.process_index for device in mesh.devices.flat))
    return order.index(jax.process_index())


def make_local_mesh() -> Mesh:
    """Return a mesh of the devices of this process alone."""
    return make_mesh(jax.local_devices())


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the layout of parameters: a copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def state_layout(state, mesh: Mesh, *, shard: bool):
    """Return the layout of each array of a training state.

    Args:
        state: tree of arrays, or of their shapes and dtypes.
        mesh: of all devices.
        shard: split each array along the longest of its axes that the devices can share, where there is one, instead
            of keeping a copy on every device.
    """

    def layout(array):
        axes = [axis for axis, size in enumerate(array.shape) if shard and size and size % mesh.size == 0]
        spec: list[str | None] = [None] * array.ndim
        if axes:
            spec[max(axes, key=lambda axis: array.shape[axis])] = DATA_AXIS
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(layout, state)


def place_state(state, mesh: Mesh, *, shard: bool):
    """Put the arrays of a training state, which all processes have alike, on all devices, as state_layout says."""

    def place(array, layout):
        if layout.is_fully_addressable:
            return jax.device_put(array, layout)
        host = np.asarray(array)
        return jax.make_array_from_callback(host.shape, layout, lambda index: host[index])

    return jax.tree.map(place, state, state_layout(state, mesh, shard=shard))


def place_locally(state, mesh: Mesh):
    """Put a tree of arrays, wherever they lie, whole on every device of this process; all processes do so together.

    Args:
        state: tree of arrays.
        mesh: as make_local_mesh returns it.
    """
    if not all(array.is_fully_addressable for array in jax.tree.leaves(state)):
        whole = jax.jit(lambda tree: tree, out_shardings=replicated(make_mesh()))(state)
        state = jax.tree.map(lambda array: array.addressable_data(0), whole)
    return jax.device_put(state, replicated(mesh))


def split(mesh: Mesh) -> NamedSharding:
    """Return the layout of a batch: its rows divided among the devices."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def place_batch(arrays, mesh: Mesh):
    """Put the arrays [B, ...] of a batch on the devices: divided where they can share it, else whole on each of them.

    For batches of any size, such as one image; training refuses those that cannot be divided.
    """
    (num_rows,) = {len(array) for array in jax.tree.leaves(arrays)}
    return jax.device_put(arrays, split(mesh) if num_rows % mesh.size == 0 else replicated(mesh))


def on_each_device(function: Callable, mesh: Mesh, *, returns_rows: bool) -> Callable:
    """Return ``function(shared, batch)``, which each device runs by itself on its own rows of the batch.

    Left to XLA, the devices would wait for each other in every round of the loops that suppress boxes, and copy tables
    that can be changed in place. If the devices cannot share the rows evenly, each computes all of them.

    Args:
        function: takes a tree of arrays that every device has whole, and one of arrays [B, ...]. It exchanges values
          with the other devices by ``ops.devices`` only.
        mesh: of the devices.
        returns_rows: whether the result has a row for each row of the batch; otherwise all devices return the same.
    """
    rows, whole = PartitionSpec(DATA_AXIS), PartitionSpec()
    divided = jax.shard_map(
        function, mesh=mesh, in_specs=(whole, rows), out_specs=rows if returns_rows else whole, check_vma=False
    )

    def run(shared, batch):
        num_rows = jax.tree.leaves(batch)[0].shape[0]
        return function(shared, batch) if num_rows % mesh.size else divided(shared, batch)

    return run


def shard_batch(batch: Batch, mesh: Mesh) -> Batch:
    """Put this process's rows of a numpy batch on its devices, as a part of the global batch."""
    return jax.tree.map(lambda array: jax.make_array_from_process_local_data(split(mesh), np.asarray(array)), batch)
