"""How arrays lie on the devices: batches split along their first axis, everything else on every device."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from maskrcnn_jax.structures import Batch


def make_mesh() -> Mesh:
    """Return a mesh of all devices with one axis, "data"."""
    # Auto: under the default, Explicit, a gather along the sharded batch axis is an error.
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the layout of parameters: a copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


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
    """Arrange the rows [B, ...] of a sharded batch as [parts, B / parts, ...]; no row leaves its device."""
    layout = NamedSharding(mesh, PartitionSpec(None, "data"))

    def cut(array):
        rows = array.reshape(mesh.size, parts, -1, *array.shape[1:]).swapaxes(0, 1)
        rows = rows.reshape(parts, -1, *array.shape[1:])
        return jax.lax.with_sharding_constraint(rows, layout)

    return jax.tree.map(cut, batch)


def shard_batch(batch: Batch, mesh: Mesh) -> Batch:
    """Put this process's rows of a numpy batch on its devices, as a part of the global batch."""
    return jax.tree.map(lambda array: jax.make_array_from_process_local_data(split(mesh), np.asarray(array)), batch)
