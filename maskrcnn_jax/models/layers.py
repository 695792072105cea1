"""Convolutions and normalisations that every part of the network is built from."""

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from maskrcnn_jax.errors import UserError
from maskrcnn_jax.models.initializers import Initializer, kaiming_uniform
from maskrcnn_jax.ops.convolution import conv2d, depthwise_conv2d
from maskrcnn_jax.ops.cpu.relu import relu as relu
from maskrcnn_jax.ops.devices import sum_over_devices
from maskrcnn_jax.ops.matmul import matmul
from maskrcnn_jax.ops.max_pool import max_pool as max_pool
from maskrcnn_jax.ops.normalization import batch_norm, group_norm, normalize
from maskrcnn_jax.ops.precision import at_least_float32

default_init = kaiming_uniform(1.0)
NUM_GROUPS = 32  # Sec. 4.1, Group Normalization; detectron2's too


def add_bias(x: Float[Array, "*shape K"], bias: Float[Array, " K"]) -> Float[Array, "*shape K"]:
    """Add bias [K] to x [..., K], in the dtype of x."""
    shape = (1,) * (x.ndim - 1) + (-1,)
    if x.dtype == jnp.float16:
        # Broadcast before it is rounded, so that its gradient is summed in float32: multiplied by the loss scale, the
        # sum over all cells easily exceeds 65504.
        return x + jnp.broadcast_to(bias.reshape(shape), x.shape).astype(x.dtype)
    return x + bias.astype(x.dtype).reshape(shape)


class Linear(nnx.Linear):
    """A fully connected layer."""

    def __call__(self, x: Float[Array, "*shape K"]) -> Float[Array, "*shape C"]:  # type: ignore[override]
        """Apply to x in the compute dtype."""
        products = matmul(x.astype(self.dtype), self.kernel[...].astype(self.dtype))
        return add_bias(products, self.bias[...])  # type: ignore[index]


class Conv(nnx.Module):
    """A square convolution that keeps the size up to its stride; a depthwise one has a window per channel."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        depthwise: bool = False,
        use_bias: bool = True,
        kernel_init: Initializer = default_init,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        kept = at_least_float32(dtype)
        shape = (kernel_size, kernel_size, 1 if depthwise else in_channels, out_channels)
        self.kernel = nnx.Param(kernel_init(rngs.params(), shape, kept))
        self.bias = nnx.Param(jnp.zeros(out_channels, kept)) if use_bias else None
        self.stride, self.depthwise, self.dtype = stride, depthwise, dtype

    def __call__(self, x: Float[Array, "N H W K"]) -> Float[Array, "N _ _ C"]:
        """Apply to x in the compute dtype."""
        convolve = depthwise_conv2d if self.depthwise else conv2d
        x = convolve(x.astype(self.dtype), self.kernel[...].astype(self.dtype), stride=self.stride)
        return x if self.bias is None else add_bias(x, self.bias[...])


def apply_together(convolutions: list[Conv], x: Float[Array, "N H W K"]) -> list[Float[Array, "N _ _ _"]]:
    """Apply convolutions of the same form to one input as a single convolution, so that the input is read once."""
    first = convolutions[0]
    kernel = jnp.concatenate([convolution.kernel[...] for convolution in convolutions], axis=-1)
    biases = [convolution.bias[...] for convolution in convolutions if convolution.bias is not None]
    bias = jnp.concatenate(biases)
    outputs = conv2d(x.astype(first.dtype), kernel.astype(first.dtype), stride=first.stride)
    outputs = add_bias(outputs, bias)
    ends = np.cumsum([array.shape[0] for array in biases])
    return jnp.split(outputs, ends[:-1], axis=-1)


class BatchStatistics(nnx.Variable):
    """Running mean and variance: neither differentiated nor decayed."""


class FrozenStatistics(nnx.Variable):
    """All four arrays of a frozen batch normalisation: constants of the network."""


class BatchNorm(nnx.Module):
    """Batch normalisation over batch, height and width.

    Differs from ``nnx.BatchNorm`` in that the running variance is the unbiased one, as PyTorch keeps it. Where devices
    share a batch, the statistics are those of the whole batch; with ``sync`` False each device uses its own, and their
    mean is kept.
    """

    def __init__(
        self, channels: int, *, dtype: DTypeLike, eps: float = 1e-5, momentum: float = 0.1, gain: float = 1.0
    ):
        kept = at_least_float32(dtype)
        self.scale = nnx.Param(jnp.full(channels, gain, kept))
        self.bias = nnx.Param(jnp.zeros(channels, kept))
        self.mean = BatchStatistics(jnp.zeros(channels, kept))
        self.var = BatchStatistics(jnp.ones(channels, kept))
        self.num_batches = BatchStatistics(jnp.zeros((), jnp.int32))  # as torch counts them, to give them back
        self.eps, self.momentum, self.dtype = eps, momentum, dtype
        self.sync = True
        self.use_running_average = False  # set by Module.train() and Module.eval()

    def __call__(self, x: Float[Array, "N H W K"], valid: Bool[Array, " N"] | None = None) -> Float[Array, "N H W K"]:
        """Normalise x; in training with the statistics of its valid rows."""
        scale, bias = self.scale[...], self.bias[...]
        if self.use_running_average:
            return normalize(x, self.mean[...], self.var[...], scale, bias, eps=self.eps, dtype=self.dtype)
        valid = jnp.ones(x.shape[0], bool) if valid is None else valid
        y, (mean, var, count) = batch_norm(x, scale, bias, valid, self.mean[...], self.eps, self.dtype, self.sync)
        unbiased = var * (count / jnp.maximum(count - 1, 1)).astype(var.dtype)
        if not self.sync:  # all devices keep the same: the mean over those that have a valid row
            share = (count > 0).astype(mean.dtype)
            share = share / jnp.maximum(sum_over_devices(share), 1)
            mean, unbiased, count = sum_over_devices((mean * share, unbiased * share, count))
        # Without a valid row there is nothing to learn about the statistics.
        momentum = jnp.where(count > 0, self.momentum, 0).astype(mean.dtype)
        self.mean[...] += momentum * (mean - self.mean[...])
        self.var[...] += momentum * (unbiased - self.var[...])
        self.num_batches[...] += (count > 0).astype(jnp.int32)
        return y


class FrozenBatchNorm(nnx.Module):
    """Batch normalisation with fixed statistics and affine parameters, for fine-tuning pretrained backbones."""

    def __init__(self, channels: int, *, dtype: DTypeLike, eps: float = 1e-5, gain: float = 1.0):
        kept = at_least_float32(dtype)
        self.scale = FrozenStatistics(jnp.full(channels, gain, kept))
        self.bias = FrozenStatistics(jnp.zeros(channels, kept))
        self.mean = FrozenStatistics(jnp.zeros(channels, kept))
        self.var = FrozenStatistics(jnp.ones(channels, kept))
        self.eps, self.dtype = eps, dtype

    def __call__(self, x: Float[Array, "N H W K"], valid: Bool[Array, " N"] | None = None) -> Float[Array, "N H W K"]:
        """Normalise x; ``valid`` has no effect here."""
        fixed = (self.mean[...], self.var[...], self.scale[...], self.bias[...])
        return normalize(x, *fixed, eps=self.eps, dtype=self.dtype)


class GroupNorm(nnx.Module):
    """Group normalisation of each row over height, width and the channels of each of 32 groups, as in detectron2."""

    def __init__(self, channels: int, *, dtype: DTypeLike, eps: float = 1e-5, gain: float = 1.0):
        if channels % NUM_GROUPS:
            raise UserError(
                f"the norm 'group' divides channels into {NUM_GROUPS} groups, which {channels} channels do not allow; "
                f"use multiples of {NUM_GROUPS} channels, or another norm"
            )
        kept = at_least_float32(dtype)
        self.scale = nnx.Param(jnp.full(channels, gain, kept))
        self.bias = nnx.Param(jnp.zeros(channels, kept))
        self.eps, self.dtype = eps, dtype

    def __call__(self, x: Float[Array, "N H W K"], valid: Bool[Array, " N"] | None = None) -> Float[Array, "N H W K"]:
        """Normalise x; ``valid`` has no effect, because rows are normalised one by one."""
        scale, bias = self.scale[...], self.bias[...]
        return group_norm(x, scale, bias, num_groups=NUM_GROUPS, eps=self.eps, dtype=self.dtype)


def make_norm(
    kind: str, channels: int, *, eps: float, momentum: float, gain: float, dtype: DTypeLike
) -> nnx.Module | None:
    """Build a normalisation layer.

    Args:
        kind: "batch", "frozen", "group" or "none".
        channels: of its input.
        eps: added to the variance.
        momentum: weight of a batch in the running statistics.
        gain: initial scale.
        dtype: of its output.

    Raises:
        UserError: for another kind, or a number of channels that cannot be divided into groups.
    """
    if kind == "none":
        return None
    if kind == "batch":
        return BatchNorm(channels, eps=eps, momentum=momentum, gain=gain, dtype=dtype)
    if kind == "frozen":
        return FrozenBatchNorm(channels, eps=eps, gain=gain, dtype=dtype)
    if kind == "group":
        return GroupNorm(channels, eps=eps, gain=gain, dtype=dtype)
    raise UserError(f"norm is {kind!r}; use 'batch', 'frozen', 'group' or 'none'")


class ConvNorm(nnx.Module):
    """A square convolution that keeps the size up to its stride, then a normalisation, which replaces its bias."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        depthwise: bool = False,
        norm: str = "none",
        norm_eps: float = 1e-5,
        norm_momentum: float = 0.1,
        norm_gain: float = 1.0,
        kernel_init: Initializer = default_init,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.conv = Conv(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            depthwise=depthwise,
            use_bias=norm == "none",
            kernel_init=kernel_init,
            dtype=dtype,
            rngs=rngs,
        )
        self.norm = make_norm(norm, out_channels, eps=norm_eps, momentum=norm_momentum, gain=norm_gain, dtype=dtype)

    def __call__(self, x: Float[Array, "N H W K"], valid: Bool[Array, " N"] | None = None) -> Float[Array, "N _ _ C"]:
        """Apply to x; only its valid rows count for batch statistics."""
        x = self.conv(x)
        return x if self.norm is None else self.norm(x, valid)
