"""Box head: class and box offsets of every RoI from its pooled 7x7 features."""

import jax
import jax.numpy as jnp
from flax import nnx

from maskrcnn_jax.models.layers import parameter_dtype

BOX_WEIGHTS = (10.0, 10.0, 5.0, 5.0)  # offsets of RoIs are small; this brings them to about unit variance


class BoxHead(nnx.Module):
    """Two fully connected layers, then class logits and offsets per class. Source: Fig. 4 (right), Mask R-CNN."""

    def __init__(
        self, in_channels: int, pool_size: int, hidden: int, num_classes: int, *, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        def linear(in_features, out_features, kernel_init):
            return nnx.Linear(
                in_features,
                out_features,
                kernel_init=kernel_init,
                dtype=dtype,
                param_dtype=parameter_dtype(dtype),
                rngs=rngs,
            )

        he = nnx.initializers.he_uniform()
        self.fc6 = linear(in_channels * pool_size**2, hidden, he)
        self.fc7 = linear(hidden, hidden, he)
        self.cls_score = linear(hidden, num_classes, nnx.initializers.normal(0.01))
        self.bbox_pred = linear(hidden, 4 * num_classes, nnx.initializers.normal(0.001))

    def __call__(self, pooled: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return class logits [..., C + 1] and offsets [..., C + 1, 4], float32 or wider.

        Args:
          pooled: [..., 7, 7, K].
        """
        leading = pooled.shape[:-3]
        hidden = nnx.relu(self.fc6(pooled.reshape(*leading, -1)))
        hidden = nnx.relu(self.fc7(hidden))
        wide = parameter_dtype(hidden.dtype)
        logits = self.cls_score(hidden).astype(wide)
        return logits, self.bbox_pred(hidden).astype(wide).reshape(*logits.shape, 4)
