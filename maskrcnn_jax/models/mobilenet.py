"""MobileNetV3-Large as a feature extractor: the last output of each of the strides 4, 8, 16 and 32.

As in torchvision's mobilenet_v3_large, the squeeze averages over the padding: unlike with a ResNet, the amount of
padding changes results far from the border. torchvision's own detection networks use other maps, both of stride 32
(layers 13 and 16; here 3, 6, 12 and 16).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from maskrcnn_jax.models.initializers import kaiming_normal
from maskrcnn_jax.models.layers import Conv, ConvNorm, relu
from maskrcnn_jax.ops.precision import at_least_float32

STEM_CHANNELS = 16
LAST_CHANNELS = 960  # of the 1x1 convolution at the end
# torchvision's, other than those of its ResNets.
NORM_EPS = 1e-3
NORM_MOMENTUM = 0.01


class Setting(NamedTuple):
    """One inverted residual."""

    kernel_size: int  # of the depthwise convolution
    expanded: int  # channels that it works on
    out_channels: int
    squeeze: bool
    hard_swish: bool  # otherwise ReLU
    stride: int


# Table 1, Searching for MobileNetV3. The first is at stride 2, before the first feature map.
STEM_BLOCK = Setting(3, 16, 16, False, False, 1)
STAGES = (
    (Setting(3, 64, 24, False, False, 2), Setting(3, 72, 24, False, False, 1)),
    (
        Setting(5, 72, 40, True, False, 2),
        Setting(5, 120, 40, True, False, 1),
        Setting(5, 120, 40, True, False, 1),
    ),
    (
        Setting(3, 240, 80, False, True, 2),
        Setting(3, 200, 80, False, True, 1),
        Setting(3, 184, 80, False, True, 1),
        Setting(3, 184, 80, False, True, 1),
        Setting(3, 480, 112, True, True, 1),
        Setting(3, 672, 112, True, True, 1),
    ),
    (
        Setting(5, 672, 160, True, True, 2),
        Setting(5, 960, 160, True, True, 1),
        Setting(5, 960, 160, True, True, 1),
    ),
)


class ConvNormActivation(ConvNorm):
    """A convolution, a normalisation and an activation."""

    def __init__(self, *args, activation: Callable[[Array], Array], **options):
        super().__init__(*args, **options)
        self.activation = activation

    def __call__(self, x: Float[Array, "N H W K"], valid: Bool[Array, " N"] | None = None) -> Float[Array, "N _ _ C"]:
        """Apply to x; only its valid rows count for batch statistics."""
        return self.activation(super().__call__(x, valid))


class SqueezeExcitation(nnx.Module):
    """Scale each channel by a number in 0..1 computed from the means of all channels.

    Source: Sec. 5.3, Searching for MobileNetV3.
    """

    def __init__(self, channels: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        squeezed = _round_to_eights(channels // 4)
        options: dict[str, Any] = {"kernel_init": kaiming_normal, "dtype": dtype, "rngs": rngs}
        self.fc1 = Conv(channels, squeezed, 1, **options)
        self.fc2 = Conv(squeezed, channels, 1, **options)

    def __call__(self, x: Float[Array, "N H W K"]) -> Float[Array, "N H W K"]:
        """Scale the channels of x."""
        means = jnp.mean(x, axis=(1, 2), keepdims=True, dtype=at_least_float32(x.dtype))
        return x * jax.nn.hard_sigmoid(self.fc2(relu(self.fc1(means))))


class InvertedResidual(nnx.Module):
    """Expand by a 1x1 convolution, filter each channel, squeeze and excite, project; a shortcut where sizes allow."""

    def __init__(self, in_channels: int, setting: Setting, *, dtype: DTypeLike, rngs: nnx.Rngs, **options):
        """Build the block.

        Args:
            in_channels: of the input.
            setting: of the block.
            dtype: compute dtype.
            rngs: for the initial values.
            options: of the convolutions and norms.
        """
        kernel_size, expanded, out_channels, squeeze, hard_swish, stride = setting
        options |= {"dtype": dtype, "rngs": rngs}
        activated = options | {"activation": jax.nn.hard_swish if hard_swish else relu}
        self.expand = ConvNormActivation(in_channels, expanded, 1, **activated) if expanded != in_channels else None
        self.depthwise = ConvNormActivation(
            expanded, expanded, kernel_size, stride=stride, depthwise=True, **activated
        )
        self.squeeze = SqueezeExcitation(expanded, dtype=dtype, rngs=rngs) if squeeze else None
        self.project = ConvNorm(expanded, out_channels, 1, **options)
        self.has_shortcut = stride == 1 and in_channels == out_channels

    def __call__(self, x: Float[Array, "N H W K"]) -> Float[Array, "N _ _ C"]:
        """Apply to x."""
        y = x if self.expand is None else self.expand(x)
        y = self.depthwise(y)
        y = y if self.squeeze is None else self.squeeze(y)
        y = self.project(y)
        return x + y if self.has_shortcut else y


class MobileNetV3(nnx.Module):
    """MobileNetV3-Large without its classifier.

    Attributes:
        out_channels: channels of the four outputs.
    """

    def __init__(
        self,
        *,
        in_channels: int = 3,
        norm: str = "batch",
        remat: bool = False,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Build the network.

        Args:
            in_channels: of the images.
            norm: "batch" or "frozen".
            remat: recompute each block in the gradient instead of keeping its activations.
            dtype: compute dtype.
            rngs: for the initial values.
        """
        options: dict[str, Any] = {
            "norm": norm,
            "norm_eps": NORM_EPS,
            "norm_momentum": NORM_MOMENTUM,
            "kernel_init": kaiming_normal,
            "dtype": dtype,
            "rngs": rngs,
        }
        swish = options | {"activation": jax.nn.hard_swish}
        self.stem = nnx.List(
            [
                ConvNormActivation(in_channels, STEM_CHANNELS, 3, stride=2, **swish),
                InvertedResidual(STEM_CHANNELS, STEM_BLOCK, **options),
            ]
        )
        stages: list[nnx.List[ConvNormActivation | InvertedResidual]] = []
        channels = STEM_BLOCK.out_channels
        for settings in STAGES:
            blocks: list[ConvNormActivation | InvertedResidual] = []
            for setting in settings:
                blocks.append(InvertedResidual(channels, setting, **options))
                channels = setting.out_channels
            stages.append(nnx.List(blocks))
        stages[-1].append(ConvNormActivation(channels, LAST_CHANNELS, 1, **swish))
        self.stages = nnx.List(stages)
        self.out_channels = (*(settings[-1].out_channels for settings in STAGES[:-1]), LAST_CHANNELS)
        self.remat = remat

    def __call__(self, images: Float[Array, "B H W I"]) -> list[Float[Array, "B _ _ _"]]:
        """Return the outputs [B, H / s, W / s, K], s = 4, 8, 16, 32, for normalised images."""
        run = nnx.remat(_apply) if self.remat else _apply
        x, outputs = images, []
        for layer in self.stem:
            x = run(layer, x)
        for stage in self.stages:
            for layer in stage:
                x = run(layer, x)
            outputs.append(x)
        return outputs


def _apply(layer, x: Float[Array, "N H W K"]) -> Float[Array, "N _ _ C"]:
    return layer(x)


def _round_to_eights(channels: int) -> int:
    """Round to a multiple of 8, but not by more than a tenth down."""
    rounded = max(8, (channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded
