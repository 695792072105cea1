"""Mask head: a 28x28 mask of every RoI from its pooled 14x14 features, or a 14x14 one without deconvolution."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from maskrcnn_jax.models.initializers import kaiming_normal, normal
from maskrcnn_jax.models.layers import ConvNorm, relu
from maskrcnn_jax.ops.dtypes import at_least_float32


class MaskHead(nnx.Module):
    """Four 3x3 convolutions, a 2x2 deconvolution unless left out, and one 1x1 filter per class.

    Only the mask of one class per RoI is ever looked at (the true class in training, the predicted one in testing),
    so only that one is computed. Source: Fig. 4 (right), Mask R-CNN.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        num_classes: int,
        *,
        deconv: bool = True,
        norm: str = "none",
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        kept = at_least_float32(dtype)
        inputs = (in_channels, channels, channels, channels)
        self.convs = nnx.List(
            ConvNorm(
                k,
                channels,
                3,
                norm=norm,
                kernel_init=kaiming_normal,
                dtype=dtype,
                rngs=rngs,
            )
            for k in inputs
        )
        if deconv:
            # A 2x2 kernel with stride 2 does not overlap: each input cell gives its own 2x2 block, a matrix product.
            self.deconv = nnx.LinearGeneral(
                channels,
                (2, 2, channels),
                kernel_init=normal((2.0 / channels) ** 0.5),
                dtype=dtype,
                param_dtype=kept,
                use_bias=False,
                rngs=rngs,
            )
            self.deconv_bias = nnx.Param(jnp.zeros(channels, kept))
        self.has_deconv = deconv
        self.logits_kernel = nnx.Param(normal(0.001)(rngs.params(), (num_classes, channels), kept))
        self.logits_bias = nnx.Param(jnp.zeros(num_classes, kept))
        self.dtype = dtype

    def __call__(self, pooled: jax.Array, labels: jax.Array, valid: jax.Array | None = None) -> jax.Array:
        """Return the mask logits [..., 28, 28] of the given classes, or [..., 14, 14], float32 or wider.

        Args:
          pooled: [..., 14, 14, K].
          labels: [...] int32.
          valid: [...] bool, the RoIs that batch statistics are taken of; all when not given.
        """
        leading = pooled.shape[:-3]
        x = pooled.reshape(-1, *pooled.shape[-3:])
        for convolution in self.convs:
            x = relu(convolution(x, None if valid is None else valid.reshape(-1)))
        x = x.reshape(math.prod(leading[:-1]), leading[-1], *x.shape[1:])  # [B, R, h, w, K]
        labels = labels.reshape(x.shape[:2])
        filters = self.logits_kernel[...][labels].astype(self.dtype)
        if self.has_deconv:
            kernel, bias = self.deconv.kernel[...].astype(self.dtype), self.deconv_bias[...].astype(self.dtype)
            logits = _enlarged_logits(x, filters, kernel, bias)
        else:
            logits = _product("brhwk,brk->brhw", x, filters)
        logits = logits + self.logits_bias[...][labels][:, :, None, None]
        return logits.reshape(*leading, *logits.shape[2:])


# RoIs of an image that are enlarged at once. The enlarged maps of 256 take 200 MB, as much again for their gradient.
CHUNK = 8


@jax.custom_vjp
def _enlarged_logits(x: jax.Array, filters: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """Apply the deconvolution, a ReLU and one filter per RoI, to one chunk of RoIs after another.

    Args:
      x: [B, R, h, w, K].
      filters: [B, R, K].
      kernel: [K, 2, 2, K] of the deconvolution, whose stride is 2: each cell gives a 2x2 block of its own.
      bias: [K].

    Returns:
      [B, R, 2 h, 2 w], float32 or wider.
    """

    def visit(_, chunk):
        x, filters = chunk
        return None, _product("brhwijk,brk->brhiwj", _enlarge(x, kernel, bias), filters)

    _, logits = jax.lax.scan(visit, None, (_cut(x), _cut(filters)))
    batch, num_rois, height, width, _ = x.shape
    return logits.swapaxes(0, 1).reshape(batch, num_rois, 2 * height, 2 * width)


def _enlarged_logits_forward(x, filters, kernel, bias):
    return _enlarged_logits(x, filters, kernel, bias), (x, filters, kernel, bias)


def _enlarged_logits_backward(residuals, gradient):
    x, filters, kernel, bias = residuals
    batch, num_rois, height, width, _ = x.shape
    gradient = gradient.reshape(batch, num_rois, height, 2, width, 2).astype(x.dtype)

    def visit(sums, chunk):
        x, filters, gradient = chunk
        enlarged = _enlarge(x, kernel, bias)
        by_filters = _product("brhiwj,brhwijk->brk", gradient, enlarged)
        inner = jnp.einsum("brhiwj,brk->brhwijk", gradient, filters)
        inner = jnp.where(enlarged > 0, inner, 0)
        # Summed per image: devices that share a batch would otherwise have to meet in every turn of the loop.
        by_kernel = sums[0] + _product("brhwl,brhwijk->blijk", x, inner)
        by_bias = sums[1] + jnp.sum(inner, axis=(1, 2, 3, 4, 5), dtype=sums[1].dtype)
        by_x = _product("brhwijk,lijk->brhwl", inner, kernel)
        return (by_kernel, by_bias), (by_x.astype(x.dtype), by_filters.astype(x.dtype))

    wide = at_least_float32(x.dtype)
    sums = jnp.zeros((batch, *kernel.shape), wide), jnp.zeros((batch, *bias.shape), wide)
    (by_kernel, by_bias), (by_x, by_filters) = jax.lax.scan(visit, sums, (_cut(x), _cut(filters), _cut(gradient)))
    return (
        by_x.swapaxes(0, 1).reshape(x.shape),
        by_filters.swapaxes(0, 1).reshape(filters.shape),
        by_kernel.sum(axis=0).astype(kernel.dtype),
        by_bias.sum(axis=0).astype(bias.dtype),
    )


_enlarged_logits.defvjp(_enlarged_logits_forward, _enlarged_logits_backward)


def _product(equation: str, *arrays: jax.Array) -> jax.Array:
    """Return an einsum that is accumulated and returned in float32 at least."""
    return jnp.einsum(equation, *arrays, preferred_element_type=at_least_float32(arrays[0].dtype))


def _enlarge(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """Return the positive part of the deconvolution of x [B, R, h, w, K], [B, R, h, w, 2, 2, K]."""
    return relu(jnp.einsum("brhwl,lijk->brhwijk", x, kernel) + bias.reshape(1, 1, 1, 1, 1, 1, -1))


def _cut(array: jax.Array) -> jax.Array:
    """Arrange [B, R, ...] as [R / r, B, r, ...], where r is the largest divisor of R up to CHUNK."""
    batch, num_rois = array.shape[:2]
    size = max(r for r in range(1, CHUNK + 1) if num_rois % r == 0)
    return array.reshape(batch, num_rois // size, size, *array.shape[2:]).swapaxes(0, 1)
