"""Max pooling without XLA's windowed maximum, whose gradient is 10 times slower on CPUs."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def max_of_slices(x: Float[Array, "B H W K"]) -> Float[Array, "B _ _ K"]:
    """Pool by the maximum over 3 x 3 cells with stride 2 and one cell of padding.

    These are maxima of shifted slices. Equal maxima share the gradient.
    """
    for axis in (1, 2):
        size = x.shape[axis]
        padding = [(0, 0)] * x.ndim
        padding[axis] = (1, 1)
        padded = jnp.pad(x, padding, constant_values=-jnp.inf)
        first, second, third = (
            jax.lax.slice_in_dim(padded, start, start + size, stride=2, axis=axis) for start in range(3)
        )
        x = jnp.maximum(jnp.maximum(first, second), third)
    return x
