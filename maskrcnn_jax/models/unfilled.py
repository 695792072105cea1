"""A network to read weights into."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from maskrcnn_jax.models.mask_rcnn import MaskRCNN
from maskrcnn_jax.options import ModelOptions


def make_unfilled(num_classes: int, options: ModelOptions) -> MaskRCNN:
    """Build a network of zeros to read weights into, without the time that drawing initial values takes.

    Args:
        num_classes: C + 1, background included.
        options: Of the network.
    """
    model = nnx.eval_shape(lambda: MaskRCNN(num_classes, options, rngs=nnx.Rngs(0)))
    nnx.update(model, jax.tree.map(lambda leaf: jnp.asarray(np.zeros(leaf.shape, leaf.dtype)), nnx.state(model)))
    return model
