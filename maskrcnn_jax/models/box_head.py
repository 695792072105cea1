"""Box head: class logits and box offsets of every RoI from its pooled 7x7 features."""

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from maskrcnn_jax.models.initializers import kaiming_normal, kaiming_uniform, normal
from maskrcnn_jax.models.layers import ConvNorm, Linear, relu
from maskrcnn_jax.ops.precision import at_least_float32

BOX_WEIGHTS = (10.0, 10.0, 5.0, 5.0)  # offsets of RoIs are small; this brings them to about unit variance


class BoxHead(nnx.Module):
    """3x3 convolutions, if any, fully connected layers, then class logits and offsets per class or for all classes.

    Source: Fig. 4 (right), Mask R-CNN, which has two fully connected layers and no convolutions; torchvision's second
    version has four and one.
    """

    def __init__(
        self,
        in_channels: int,
        pool_size: int,
        num_classes: int,
        *,
        conv_channels: tuple[int, ...] = (),
        fc_channels: tuple[int, ...] = (1024, 1024),
        norm: str = "none",
        class_bias: float = 0.0,
        class_agnostic: bool = False,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        def linear(in_features, out_features, kernel_init, bias=0.0):
            return Linear(
                in_features,
                out_features,
                kernel_init=kernel_init,
                bias_init=nnx.initializers.constant(bias),
                dtype=dtype,
                param_dtype=at_least_float32(dtype),
                rngs=rngs,
            )

        convs, channels = [], in_channels
        for out_channels in conv_channels:
            convs.append(
                ConvNorm(
                    channels,
                    out_channels,
                    3,
                    norm=norm,
                    kernel_init=kaiming_normal,
                    dtype=dtype,
                    rngs=rngs,
                )
            )
            channels = out_channels
        fcs, features = [], channels * pool_size**2
        for out_features in fc_channels:
            fcs.append(linear(features, out_features, kaiming_uniform(2.0)))
            features = out_features
        self.convs, self.fcs = nnx.List(convs), nnx.List(fcs)
        self.cls_score = linear(features, num_classes, normal(0.01), class_bias)
        self.bbox_pred = linear(features, 4 if class_agnostic else 4 * num_classes, normal(0.001))

    def __call__(
        self, pooled: Float[Array, "*B S S K"], valid: Bool[Array, "*B"] | None = None
    ) -> tuple[Float[Array, "*B C1"], Float[Array, "*B _ 4"]]:
        """Return class logits [..., C + 1] and offsets [..., C + 1, 4], or [..., 1, 4], float32 or wider.

        Args:
            pooled: [..., 7, 7, K].
            valid: [...] bool, RoIs that count for batch statistics; all by default.
        """
        leading = pooled.shape[:-3]
        x = pooled.reshape(-1, *pooled.shape[-3:])
        for convolution in self.convs:
            x = relu(convolution(x, None if valid is None else valid.reshape(-1)))
        x = x.reshape(*leading, -1)
        for linear in self.fcs:
            x = relu(linear(x))
        wide = at_least_float32(x.dtype)
        logits, deltas = self.cls_score(x).astype(wide), self.bbox_pred(x).astype(wide)
        return logits, deltas.reshape(*leading, deltas.shape[-1] // 4, 4)


def deltas_of(labels: Int[Array, "B R"], deltas: Float[Array, "B R _ 4"]) -> Float[Array, "B R 4"]:
    """Return the offsets of one class per RoI [B, R], of those of all classes, or of the only ones that there are."""
    index = labels if deltas.shape[2] > 1 else jnp.zeros_like(labels)
    return jnp.take_along_axis(deltas, index[..., None, None], axis=2)[:, :, 0]
