"""Max pooling, by shifted slices on CPUs and by XLA's windowed maximum elsewhere."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from maskrcnn_jax.ops.cpu.max_pool import max_of_slices


@jax.custom_vjp
def max_pool(x: Float[Array, "B H W K"]) -> Float[Array, "B _ _ K"]:
    """Pool by the maximum over 3 x 3 cells with stride 2 and one cell of padding.

    Of equal maxima the first gets the gradient, as in torch; on CPUs they share it. Equal values come from equal
    patches, so the gradients of the parameters are the same.
    """
    return jax.lax.platform_dependent(x, cpu=max_of_slices, default=max_of_windows)


def _forward(x):
    return max_pool(x), x


def _backward(x, gradient):
    def pull_back(form):
        return lambda x, gradient: jax.vjp(form, x)[1](gradient)

    forms = {"cpu": pull_back(max_of_slices), "default": pull_back(max_of_windows)}
    return jax.lax.platform_dependent(x, gradient, **forms)


max_pool.defvjp(_forward, _backward)


def max_of_windows(x: Float[Array, "B H W K"]) -> Float[Array, "B _ _ K"]:
    """Pool by XLA's windowed maximum."""
    window, strides, padding = (1, 3, 3, 1), (1, 2, 2, 1), ((0, 0), (1, 1), (1, 1), (0, 0))
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, strides, padding)
