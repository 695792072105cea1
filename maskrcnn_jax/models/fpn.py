"""Feature Pyramid Network: the backbone's maps, merged from coarse to fine, plus a coarser one."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from maskrcnn_jax.models.layers import ConvNorm


class FPN(nnx.Module):
    """Lateral 1x1 convolutions, nearest-neighbour top-down additions, 3x3 output convolutions.

    The coarser one, P6 over P2..P5, is every second cell of the last (torchvision's LastLevelMaxPool).
    Source: Sec. 3, Feature Pyramid Networks.
    """

    def __init__(
        self,
        in_channels: tuple[int, ...],
        out_channels: int,
        *,
        norm: str = "none",
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        options: dict[str, Any] = {"norm": norm, "dtype": dtype, "rngs": rngs}
        self.inner = nnx.List([ConvNorm(k, out_channels, 1, **options) for k in in_channels])
        self.layer = nnx.List([ConvNorm(out_channels, out_channels, 3, **options) for _ in in_channels])

    def __call__(self, features: list[Float[Array, "B _ _ _"]]) -> list[Float[Array, "B _ _ K"]]:
        """Return the pyramid of the backbone's maps, finest first; it has one level more than there are maps."""
        merged = self.inner[-1](features[-1])
        outputs = [self.layer[-1](merged)]
        for i in reversed(range(len(features) - 1)):
            lateral = self.inner[i](features[i])
            _, height, width, _ = lateral.shape
            merged = lateral + upsample_nearest(merged, (height, width))
            outputs.insert(0, self.layer[i](merged))
        outputs.append(outputs[-1][:, ::2, ::2])
        return outputs


def upsample_nearest(x: Float[Array, "B h w K"], shape: tuple[int, int]) -> Float[Array, "B H W K"]:
    """Double x [B, h, w, K] and crop to ``shape``, which is 2h or 2h - 1 and likewise in width.

    For these sizes this is the nearest-neighbour rule floor(i * h / H).
    """
    x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
    return x[:, : shape[0], : shape[1]]
