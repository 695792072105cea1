"""Batch normalisation, normalisation with given statistics, and group and layer normalisation.

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


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def batch_norm(
    x: Float[Array, "N H W K"],
    scale: Float[Array, " K"],
    bias: Float[Array, " K"],
    valid: Bool[Array, " N"],
    shift: Float[Array, " K"],
    eps: float,
    dtype: DTypeLike,
    sync: bool = True,
) -> tuple[Float[Array, "N H W K"], Statistics]:
    """Normalise by the statistics of the valid rows.

    Args:
        x: [N, H, W, K].
        scale: [K].
        bias: [K].
        valid: [N] bool, rows that count for the statistics; all rows are normalised.
        shift: [K], an estimate of the mean.
        eps: added to the variance.
        dtype: of the result.
        sync: include the rows on the other devices.

    Returns:
        [N, H, W, K], and the statistics, which have no gradient.
    """
    statistics = _statistics(x.astype(scale.dtype), valid, shift, _total(sync))
    mean, var, _ = statistics
    return normalize(x, mean, var, scale, bias, eps=eps, dtype=dtype), statistics


def _total(sync):
    """Return the function that adds what the devices that share statistics have."""
    return sum_over_devices if sync else lambda values: values


def _forward(x, scale, bias, valid, shift, eps, dtype, sync):
    y, statistics = batch_norm(x, scale, bias, valid, shift, eps, dtype, sync)
    return (y, statistics), (x, scale, valid, statistics)


def _backward(eps, dtype, sync, residuals, gradients):
    x, scale, valid, (mean, var, count) = residuals
    gradient = gradients[0].astype(scale.dtype)
    inverse = jax.lax.rsqrt(var + eps)
    normalized = _by_channel(x.astype(scale.dtype), inverse, -mean * inverse)
    by_scale, by_bias = jnp.sum(gradient * normalized, axis=(0, 1, 2)), jnp.sum(gradient, axis=(0, 1, 2))
    # A valid cell also moves the mean and the variance, and through them all cells that these normalise.
    all_scale, all_bias = _total(sync)((by_scale, by_bias))
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


def group_norm(
    x: Float[Array, "N H W K"],
    scale: Float[Array, " K"],
    bias: Float[Array, " K"],
    *,
    num_groups: int,
    eps: float,
    dtype: DTypeLike,
) -> Float[Array, "N H W K"]:
    """Normalise each row by the statistics of groups of neighbouring channels over all of its cells.

    Cells in the padding of an image count, as in detectron2. Source: Sec. 3.1, Group Normalization.

    Args:
        x: [N, H, W, K].
        scale: [K].
        bias: [K].
        num_groups: that the channels are divided into; a divisor of K.
        eps: added to the variance.
        dtype: of the result.
    """
    num_rows, channels = x.shape[0], x.shape[-1]

    def mean_of_groups(x):
        # Cells first: their sum is fast where the channels come last.
        means = jnp.mean(x, axis=(1, 2)).reshape(num_rows, num_groups, channels // num_groups)
        return jnp.repeat(jnp.mean(means, axis=-1), channels // num_groups, axis=-1)[:, None, None]  # [N, 1, 1, K]

    return _standardize(x, scale, bias, mean_of_groups, eps, dtype)


def layer_norm(
    x: Float[Array, "*shape K"],
    scale: Float[Array, " K"],
    bias: Float[Array, " K"],
    *,
    eps: float,
    dtype: DTypeLike,
) -> Float[Array, "*shape K"]:
    """Normalise each cell by the statistics of its channels. Source: Layer Normalization (Ba et al., 2016)."""
    return _standardize(x, scale, bias, lambda x: jnp.mean(x, axis=-1, keepdims=True), eps, dtype)


def _standardize(x, scale, bias, mean, eps, dtype):
    x = x.astype(scale.dtype)
    x = x - mean(x)
    return _by_channel(x * jax.lax.rsqrt(mean(jnp.square(x)) + eps), scale, bias).astype(dtype)


def _by_channel(x, factor, offset):
    shape = (1,) * (x.ndim - 1) + (-1,)
    return x * factor.reshape(shape) + offset.reshape(shape)


def _statistics(x, valid, shift, total):
    """Return the statistics of x [N, H, W, K] over its valid rows; ``total`` adds those of other devices.

    In one pass over x, since two would read the activations twice. The difference of two squares cancels few digits if
    x is first moved by ``shift`` [K], an estimate of its mean.
    """
    x = x - shift.reshape(1, 1, 1, -1)
    rows = valid.astype(x.dtype)
    count = total(jnp.sum(rows)) * (x.shape[1] * x.shape[2])
    weight = (rows / jnp.maximum(count, 1)).reshape(-1, 1, 1, 1)
    sums = jnp.sum(x * weight, axis=(0, 1, 2)), jnp.sum(jnp.square(x) * weight, axis=(0, 1, 2))
    mean, mean_square = total(sums)
    var = jnp.maximum(mean_square - jnp.square(mean), 0)
    return mean + shift, var, count
