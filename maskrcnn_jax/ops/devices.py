"""The values that devices exchange when they share a batch.

Each device runs the network by itself, on its own images (``distributed.on_each_device``). Only these functions make
devices wait for each other. Outside of ``on_each_device`` they leave their argument as it is.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Key, Num, PyTree

DATA_AXIS = "data"  # of the mesh: the rows of the batch are divided along it


def sum_over_devices(values: PyTree[Num[Array, "..."]]) -> PyTree[Num[Array, "..."]]:
    """Add the arrays that the devices have, each for its own images."""
    return jax.lax.psum(values, DATA_AXIS) if _is_shared() else values


def any_on_devices(value: Bool[Array, ""]) -> Bool[Array, ""]:
    """Return whether the value is True on any device."""
    return sum_over_devices(value.astype(jnp.int32)) > 0


def split_key(key: Key[Array, ""], num_images: int) -> Key[Array, " {num_images}"]:
    """Split a key into one for each image on this device, the same whatever the number of devices."""
    if not _is_shared():
        return jax.random.split(key, num_images)
    keys = jax.random.split(key, num_images * jax.lax.axis_size(DATA_AXIS))
    return jax.lax.dynamic_slice_in_dim(keys, jax.lax.axis_index(DATA_AXIS) * num_images, num_images)


def _is_shared() -> bool:
    return DATA_AXIS in jax.sharding.get_abstract_mesh().manual_axes
