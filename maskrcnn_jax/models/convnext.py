"""ConvNeXt-Tiny, -Small and -Base as feature extractors: the outputs of the four stages (strides 4, 8, 16, 32).

As torchvision's, without stochastic depth. Layer normalisation works on each cell by itself, so that results depend
neither on the batch nor, far from the border, on the padding.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from maskrcnn_jax.models.initializers import normal
from maskrcnn_jax.models.layers import Conv, Linear, add_bias
from maskrcnn_jax.ops.convolution import patch_conv2d
from maskrcnn_jax.ops.normalization import layer_norm
from maskrcnn_jax.ops.precision import at_least_float32

# Blocks and channels of the stages. Sec. 3, A ConvNet for the 2020s.
ARCHITECTURES = {
    "convnext_tiny": ((3, 3, 9, 3), (96, 192, 384, 768)),
    "convnext_small": ((3, 3, 27, 3), (96, 192, 384, 768)),
    "convnext_base": ((3, 3, 27, 3), (128, 256, 512, 1024)),
}
NORM_EPS = 1e-6
LAYER_SCALE = 1e-6  # initial factor of each residual branch

_initial = normal(0.02)


class LayerNorm(nnx.Module):
    """Layer normalisation over the channels of each cell."""

    def __init__(self, channels: int, *, dtype: DTypeLike):
        kept = at_least_float32(dtype)
        self.scale = nnx.Param(jnp.ones(channels, kept))
        self.bias = nnx.Param(jnp.zeros(channels, kept))
        self.dtype = dtype

    def __call__(self, x: Float[Array, "N H W K"]) -> Float[Array, "N H W K"]:
        """Normalise x."""
        return layer_norm(x, self.scale[...], self.bias[...], eps=NORM_EPS, dtype=self.dtype)


class PatchConv(nnx.Module):
    """A convolution whose stride is its window, without padding: a product with each patch."""

    def __init__(self, in_channels: int, out_channels: int, size: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        kept = at_least_float32(dtype)
        self.kernel = nnx.Param(_initial(rngs.params(), (size, size, in_channels, out_channels), kept))
        self.bias = nnx.Param(jnp.zeros(out_channels, kept))
        self.dtype = dtype

    def __call__(self, x: Float[Array, "N H W K"]) -> Float[Array, "N _ _ C"]:
        """Apply to x in the compute dtype."""
        return add_bias(patch_conv2d(x.astype(self.dtype), self.kernel[...].astype(self.dtype)), self.bias[...])


class Stem(nnx.Module):
    """Patches of 4x4 pixels, then a norm."""

    def __init__(self, in_channels: int, channels: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.conv = PatchConv(in_channels, channels, 4, dtype=dtype, rngs=rngs)
        self.norm = LayerNorm(channels, dtype=dtype)

    def __call__(self, x: Float[Array, "N H W I"]) -> Float[Array, "N _ _ K"]:
        """Apply to images."""
        return self.norm(self.conv(x))


class Downsample(nnx.Module):
    """A norm, then patches of 2x2 cells."""

    def __init__(self, in_channels: int, channels: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.norm = LayerNorm(in_channels, dtype=dtype)
        self.conv = PatchConv(in_channels, channels, 2, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "N H W K"]) -> Float[Array, "N _ _ C"]:
        """Apply to x."""
        return self.conv(self.norm(x))


class Block(nnx.Module):
    """Depthwise 7x7 convolution, norm, two linear layers with a GELU between them; a scaled residual branch."""

    def __init__(self, channels: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        def linear(in_features, out_features):
            return Linear(
                in_features,
                out_features,
                kernel_init=_initial,
                dtype=dtype,
                param_dtype=at_least_float32(dtype),
                rngs=rngs,
            )

        self.depthwise = Conv(channels, channels, 7, depthwise=True, kernel_init=_initial, dtype=dtype, rngs=rngs)
        self.norm = LayerNorm(channels, dtype=dtype)
        self.expand = linear(channels, 4 * channels)
        self.project = linear(4 * channels, channels)
        self.layer_scale = nnx.Param(jnp.full(channels, LAYER_SCALE, at_least_float32(dtype)))

    def __call__(self, x: Float[Array, "N H W K"]) -> Float[Array, "N H W K"]:
        """Apply to x."""
        y = self.expand(self.norm(self.depthwise(x)))
        y = self.project(jax.nn.gelu(y, approximate=False))
        return x + (y * self.layer_scale[...].reshape(1, 1, 1, -1)).astype(y.dtype)


class ConvNeXt(nnx.Module):
    """ConvNeXt without its classifier.

    Attributes:
        out_channels: channels of the four outputs.
    """

    def __init__(
        self,
        name: str = "convnext_tiny",
        *,
        in_channels: int = 3,
        remat: bool = False,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Build the network.

        Args:
            name: one of ARCHITECTURES.
            in_channels: of the images.
            remat: recompute each block in the gradient instead of keeping its activations.
            dtype: compute dtype.
            rngs: for the initial values.
        """
        depths, widths = ARCHITECTURES[name]
        self.stem = Stem(in_channels, widths[0], dtype=dtype, rngs=rngs)
        stages: list[nnx.List[Downsample | Block]] = []
        for i, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            blocks: list[Downsample | Block] = [Block(width, dtype=dtype, rngs=rngs) for _ in range(depth)]
            if i > 0:
                blocks.insert(0, Downsample(widths[i - 1], width, dtype=dtype, rngs=rngs))
            stages.append(nnx.List(blocks))
        self.stages = nnx.List(stages)
        self.out_channels = widths
        self.remat = remat

    def __call__(self, images: Float[Array, "B H W I"]) -> list[Float[Array, "B _ _ _"]]:
        """Return the stages' outputs [B, H / s, W / s, K], s = 4, 8, 16, 32, for normalised images."""
        run = nnx.remat(_apply) if self.remat else _apply
        x, outputs = self.stem(images), []
        for stage in self.stages:
            for layer in stage:
                x = run(layer, x)
            outputs.append(x)
        return outputs


def _apply(layer, x: Float[Array, "N H W K"]) -> Float[Array, "N _ _ C"]:
    return layer(x)
