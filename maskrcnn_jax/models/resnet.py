"""ResNet-18/34/50/101 as a feature extractor: the outputs of its four stages (strides 4, 8, 16, 32)."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from maskrcnn_jax.models.initializers import kaiming_normal
from maskrcnn_jax.models.layers import ConvNorm, max_pool, relu

# Blocks per stage, and whether they are bottlenecks. Table 1, Deep Residual Learning.
ARCHITECTURES = {
    "resnet18": ((2, 2, 2, 2), False),
    "resnet34": ((3, 4, 6, 3), False),
    "resnet50": ((3, 4, 6, 3), True),
    "resnet101": ((3, 4, 23, 3), True),
}


class Block(nnx.Module):
    """Residual block: convolutions with norms, a shortcut around them, ReLU after the sum."""

    def __init__(self, in_channels, layers, *, stride, norm, norm_eps, dtype, rngs):
        """Build the block.

        Args:
            in_channels: of the input.
            layers: (kernel size, channels, stride) of each convolution.
            stride: of the whole block.
            norm: kind of normalisation.
            norm_eps: added to its variance.
            dtype: compute dtype.
            rngs: for the initial values.
        """
        options: dict[str, Any] = {
            "norm": norm,
            "norm_eps": norm_eps,
            "kernel_init": kaiming_normal,
            "dtype": dtype,
            "rngs": rngs,
        }
        convs, channels = [], in_channels
        for i, (kernel_size, out_channels, conv_stride) in enumerate(layers):
            # A trained norm that starts the residual branch at zero makes deep nets from scratch easier to train.
            gain = 0.0 if i == len(layers) - 1 and norm != "frozen" else 1.0
            convs.append(ConvNorm(channels, out_channels, kernel_size, stride=conv_stride, norm_gain=gain, **options))
            channels = out_channels
        self.convs = nnx.List(convs)
        projected = stride != 1 or channels != in_channels
        self.shortcut = ConvNorm(in_channels, channels, 1, stride=stride, **options) if projected else None
        self.out_channels = channels

    def __call__(self, x: Float[Array, "B H W K"]) -> Float[Array, "B _ _ C"]:
        """Apply to x."""
        identity = x if self.shortcut is None else self.shortcut(x)
        for i, convolution in enumerate(self.convs):
            x = convolution(x if i == 0 else relu(x))
        return relu(x + identity)


def _block_layers(bottleneck_channels: int, out_channels: int, stride: int, stride_in_1x1: bool):
    """Return (kernel size, channels, stride) of each convolution; without bottleneck channels, of a basic block."""
    if not bottleneck_channels:
        return ((3, out_channels, stride), (3, out_channels, 1))
    first, second = (stride, 1) if stride_in_1x1 else (1, stride)
    return ((1, bottleneck_channels, first), (3, bottleneck_channels, second), (1, out_channels, 1))


class ResNet(nnx.Module):
    """Residual network without its classifier.

    Attributes:
        out_channels: channels of the four outputs.
    """

    def __init__(
        self,
        name: str = "resnet50",
        *,
        in_channels: int = 3,
        stem_channels: int = 64,
        stage_channels: int = 0,
        bottleneck_channels: int = 64,
        norm: str = "batch",
        norm_eps: float = 1e-5,
        stride_in_1x1: bool = False,
        remat: bool = False,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Build the network.

        Args:
            name: one of ARCHITECTURES.
            in_channels: of the images.
            stem_channels: outputs of the 7x7 convolution.
            stage_channels: outputs of the first stage, twice as many in each later one; 0 selects 256 for networks
                with bottlenecks and 64 for those without.
            bottleneck_channels: inside the bottlenecks of the first stage, likewise; unused where there are none.
            norm: "batch", "frozen" or "group".
            norm_eps: added to its variance.
            stride_in_1x1: put the stride of a bottleneck in its first convolution (MSRA's original weights).
            remat: recompute each block in the gradient instead of keeping its activations.
            dtype: compute dtype.
            rngs: for the initial values.
        """
        depths, bottleneck = ARCHITECTURES[name]
        options: dict[str, Any] = {"norm": norm, "norm_eps": norm_eps, "dtype": dtype, "rngs": rngs}
        inner = bottleneck_channels if bottleneck else 0
        outer = stage_channels or (256 if bottleneck else 64)
        self.stem = ConvNorm(in_channels, stem_channels, 7, stride=2, kernel_init=kaiming_normal, **options)
        stages, channels = [], stem_channels
        for stage, depth in enumerate(depths):
            blocks = []
            for i in range(depth):
                stride = 2 if stage > 0 and i == 0 else 1
                layers = _block_layers(inner * 2**stage, outer * 2**stage, stride, stride_in_1x1)
                block = Block(channels, layers, stride=stride, **options)
                blocks.append(block)
                channels = block.out_channels
            stages.append(nnx.List(blocks))
        self.stages = nnx.List(stages)
        self.out_channels = tuple(stage[-1].out_channels for stage in stages)
        self.remat = remat

    def __call__(self, images: Float[Array, "B H W I"]) -> list[Float[Array, "B _ _ _"]]:
        """Return the stages' outputs [B, H / s, W / s, K], s = 4, 8, 16, 32, for normalised images."""
        x = max_pool(relu(self.stem(images)))
        outputs, run = [], nnx.remat(Block.__call__) if self.remat else Block.__call__
        for stage in self.stages:
            for block in stage:
                x = run(block, x)
            outputs.append(x)
        return outputs
