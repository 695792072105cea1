"""Region proposal network: for every anchor, how likely it holds an object and how to move it onto the object."""

from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from maskrcnn_jax.models.initializers import normal
from maskrcnn_jax.models.layers import Conv, ConvNorm, apply_together, relu
from maskrcnn_jax.ops.precision import at_least_float32

_small_normal = normal(0.01)


class RPNHead(nnx.Module):
    """3x3 convolutions shared by all levels, then two 1x1 convolutions. Source: Sec. 3.1, Faster R-CNN."""

    def __init__(
        self, in_channels: int, channels: int, num_anchors: int, *, depth: int = 1, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        inputs = (in_channels, *[channels] * (depth - 1))
        self.convs = nnx.List(
            ConvNorm(k, channels, 3, kernel_init=_small_normal, dtype=dtype, rngs=rngs) for k in inputs
        )
        self.cls_logits = Conv(channels, num_anchors, 1, kernel_init=_small_normal, dtype=dtype, rngs=rngs)
        self.bbox_pred = Conv(channels, 4 * num_anchors, 1, kernel_init=_small_normal, dtype=dtype, rngs=rngs)

    def __call__(
        self, features: list[Float[Array, "B _ _ K"]]
    ) -> tuple[list[Float[Array, "B _"]], list[Float[Array, "B _ 4"]]]:
        """Predict for every anchor of every level.

        Args:
            features: [B, H_l, W_l, K] per level.

        Returns:
            Per level, objectness logits [B, A_l] in float32 or wider and offsets [B, A_l, 4] in the compute dtype,
            both in the order of ops.anchors.grid_anchors.
        """
        objectness, deltas = [], []
        for feature in features:
            hidden = feature
            for convolution in self.convs:
                hidden = relu(convolution(hidden))
            logits, offsets = apply_together([self.cls_logits, self.bbox_pred], hidden)
            batch = feature.shape[0]
            objectness.append(logits.reshape(batch, -1).astype(at_least_float32(logits.dtype)))
            deltas.append(offsets.reshape(batch, -1, 4))  # only the few that are used are converted
        return objectness, deltas
