"""Batch normalisation with the statistics of the whole batch, and normalisation with given ones.

The gradient of batch normalisation is written by hand and needs only the input, in the compute dtype. With automatic
differentiation, XLA would keep a float32 copy of the input, which is twice as large.
"""

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from maskrcnn_jax.ops.devices import sum_over_devices

Statistics = tuple[Float[Array, " K"], Float[Array, " K"], Float[Array, ""]]  # mean, biased variance, number of cells


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def batch_norm(
    x: Float[Array, "N H W K"],
    scale: Float[Array, " K"],
    bias: Float[Array, " K"],
    valid: Bool[Array, " N"],
    shift: Float[Array, " K"],
    eps: float,
    dtype: DTypeLike,
) -> tuple[Float[Array, "N H W K"], Statistics]:
    """Normalise by the statistics of the valid rows, including those on the other devices.

    Args:
        x: [N, H, W, K].
        scale: [K].
        bias: [K].
        valid: [N] bool, rows that count for the statistics; all rows are normalised.
        shift: [K], an estimate of the mean.
        eps: added to the variance.
        dtype: of the result.

    Returns:
        [N, H, W, K], and the statistics, which have no gradient.
    """
    statistics = _statistics(x.astype(scale.dtype), valid, shift)
    mean, var, _ = statistics
    return normalize(x, mean, var, scale, bias, eps=eps, dtype=dtype), statistics


def _forward(x, scale, bias, valid, shift, eps, dtype):
    y, statistics = batch_norm(x, scale, bias, valid, shift, eps, dtype)
    return (y, statistics), (x, scale, valid, statistics)


def _backward(eps, dtype, residuals, gradients):
    x, scale, valid, (mean, var, count) = residuals
    gradient = gradients[0].astype(scale.dtype)
    inverse = jax.lax.rsqrt(var + eps)
    normalized = _by_channel(x.astype(scale.dtype), inverse, -mean * inverse)
    by_scale, by_bias = jnp.sum(gradient * normalized, axis=(0, 1, 2)), jnp.sum(gradient, axis=(0, 1, 2))
    # A valid cell also moves the mean and the variance, and through them all cells on all devices.
    all_scale, all_bias = sum_over_devices((by_scale, by_bias))
    share = (valid.astype(scale.dtype) / jnp.maximum(count, 1)).reshape(-1, 1, 1, 1)
    by_x = gradient - share * _by_channel(normalized, all_scale, all_bias)
    by_x = by_x * (scale * inverse).reshape(1, 1, 1, -1)
    return by_x.astype(x.dtype), by_scale, by_bias, None, None


batch_norm.defvjp(_forward, _backward)


def normalize(
    x: Float[Array, "N H W K"],
    mean: Float[Array, " K"],
    var: Float[Array, " K"],
    scale: Float[Array, " K"],
    bias: Float[Array, " K"],
    *,
    eps: float,
    dtype: DTypeLike,
) -> Float[Array, "N H W K"]:
    """Apply one multiplication and one addition per element, their factors computed in full precision."""
    factor = scale * jax.lax.rsqrt(var + eps)
    return _by_channel(x, factor, bias - mean * factor).astype(dtype)


def _by_channel(x, factor, offset):
    shape = (1,) * (x.ndim - 1) + (-1,)
    return x * factor.reshape(shape) + offset.reshape(shape)


def _statistics(x, valid, shift):
    """Return the statistics of x [N, H, W, K] over its valid rows.

    In one pass over x, since two would read the activations twice. The difference of two squares cancels few digits if
    x is first moved by ``shift`` [K], an estimate of its mean.
    """
    x = x - shift.reshape(1, 1, 1, -1)
    rows = valid.astype(x.dtype)
    count = sum_over_devices(jnp.sum(rows)) * (x.shape[1] * x.shape[2])
    weight = (rows / jnp.maximum(count, 1)).reshape(-1, 1, 1, 1)
    sums = jnp.sum(x * weight, axis=(0, 1, 2)), jnp.sum(jnp.square(x) * weight, axis=(0, 1, 2))
    mean, mean_square = sum_over_devices(sums)
    var = jnp.maximum(mean_square - jnp.square(mean), 0)
    return mean + shift, var, count
