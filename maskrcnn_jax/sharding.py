"""How arrays lie on the devices: batches split along their first axis, parameters whole or split as well."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from maskrcnn_jax.structures import Batch


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return a mesh with one axis, "data", of these devices; of all, those of other processes too, if not given."""
    devices = jax.devices() if devices is None else devices
    # Auto: under the default, Explicit, a gather along the sharded batch axis is an error.
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def make_local_mesh() -> Mesh:
    """Return a mesh of the devices of this process alone."""
    return make_mesh(jax.local_devices())


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the layout of parameters: a copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def place_state(state, mesh: Mesh, *, divide: bool):
    """Put the arrays of a training state, which all processes have alike, on all devices.

    Args:
      state: tree of arrays.
      mesh: of all devices.
      divide: split each array along the longest of its axes that the devices can share, where there is one, instead of
        keeping a copy on every device.
    """

    def place(array):
        axes = [axis for axis, size in enumerate(array.shape) if divide and size and size % mesh.size == 0]
        spec = [None] * array.ndim
        if axes:
            spec[max(axes, key=lambda axis: array.shape[axis])] = "data"
        layout = NamedSharding(mesh, PartitionSpec(*spec))
        if layout.is_fully_addressable:
            return jax.device_put(array, layout)
        host = np.asarray(array)
        return jax.make_array_from_callback(host.shape, layout, lambda index: host[index])

    return jax.tree.map(place, state)


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
    return NamedSharding(mesh, PartitionSpec("data"))


def place_batch(arrays, mesh: Mesh):
    """Put the arrays [B, ...] of a batch on the devices: divided where they can share it, else whole on each of them.

    For batches of any size, such as one image; training refuses those that cannot be divided.
    """
    (num_rows,) = {len(array) for array in jax.tree.leaves(arrays)}
    return jax.device_put(arrays, split(mesh) if num_rows % mesh.size == 0 else replicated(mesh))


def cut_batch(batch: Batch, parts: int, mesh: Mesh) -> Batch:
    """Arrange the rows [B, ...] of a sharded batch as [parts, B / parts, ...]; no row leaves its device.

    Part p has the rows p, p + parts, p + 2 parts, ..., whatever the number of devices.
    """
    layout = NamedSharding(mesh, PartitionSpec(None, "data"))

    def cut(array):
        rows = jnp.moveaxis(array.reshape(mesh.size, -1, parts, *array.shape[1:]), 2, 0)
        rows = rows.reshape(parts, -1, *array.shape[1:])
        return jax.lax.with_sharding_constraint(rows, layout)

    return jax.tree.map(cut, batch)


def shard_batch(batch: Batch, mesh: Mesh) -> Batch:
    """Put this process's rows of a numpy batch on its devices, as a part of the global batch."""
    return jax.tree.map(lambda array: jax.make_array_from_process_local_data(split(mesh), np.asarray(array)), batch)
