"""Mask head: a 28x28 mask of every RoI from its pooled 14x14 features, or a 14x14 one without deconvolution."""

import math

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from maskrcnn_jax.models.initializers import kaiming_normal, normal
from maskrcnn_jax.models.layers import ConvNorm, relu
from maskrcnn_jax.ops.deconvolution import enlarged_logits, product
from maskrcnn_jax.ops.precision import at_least_float32


class MaskHead(nnx.Module):
    """Four 3x3 convolutions, a 2x2 deconvolution unless left out, and one 1x1 filter per class.

    Only the mask of one class per RoI is used (the true class in training, the predicted one in testing), so only that
    one is computed. Source: Fig. 4 (right), Mask R-CNN.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        num_classes: int,
        *,
        deconv: bool = True,
        norm: str = "none",
        dtype: DTypeLike,
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

    def __call__(
        self, pooled: Float[Array, "*B S S K"], labels: Int[Array, "*B"], valid: Bool[Array, "*B"] | None = None
    ) -> Float[Array, "*B S2 S2"]:
        """Return the mask logits [..., 28, 28] of the given classes, or [..., 14, 14], float32 or wider.

        Args:
            pooled: [..., 14, 14, K].
            labels: [...] int32.
            valid: [...] bool, RoIs that count for batch statistics; all by default.
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
            logits = enlarged_logits(x, filters, kernel, bias)
        else:
            logits = product("brhwk,brk->brhw", x, filters)
        logits = logits + self.logits_bias[...][labels][:, :, None, None]
        return logits.reshape(*leading, *logits.shape[2:])
