"""Initial values of weights, drawn with NumPy: JAX would compile a program for every shape, many seconds in all."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

Initializer = Callable[..., jax.Array]


def normal(std: float) -> Initializer:
    """Make an initializer with a normal distribution around zero."""

    def draw(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        return rng.standard_normal(shape, dtype) * np.asarray(std, dtype)

    return _initializer(draw)


def kaiming_normal(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> jax.Array:
    """Draw from the normal distribution whose variance is 2 / fan-out, for what a ReLU follows.

    Args:
        key: a random key.
        shape: [..., in, out], what comes before being the window of a convolution.
        dtype: float32 or float64.
    """
    fan_out = np.prod(shape) / shape[-2]
    return normal((2 / fan_out) ** 0.5)(key, shape, dtype)


def kaiming_uniform(gain: float) -> Initializer:
    """Make an initializer for shapes [..., in, out] with a uniform distribution of variance ``gain`` / fan-in."""

    def draw(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        fan_in = np.prod(shape) / shape[-1]
        return (rng.random(shape, dtype) * 2 - 1) * np.asarray((3 * gain / fan_in) ** 0.5, dtype)

    return _initializer(draw)


def _initializer(draw: Callable[[np.random.Generator, tuple[int, ...], np.dtype], np.ndarray]) -> Initializer:
    def initializer(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> jax.Array:
        dtype = jnp.dtype(dtype)

        def values(key_data):
            return draw(np.random.default_rng(np.asarray(key_data)), shape, dtype)

        key_data = jax.random.key_data(key)
        if isinstance(key_data, jax.core.Tracer):  # as in nnx.eval_shape, which asks for the structure only
            return jax.pure_callback(values, jax.ShapeDtypeStruct(shape, dtype), key_data)
        return jnp.asarray(values(key_data))

    return initializer
