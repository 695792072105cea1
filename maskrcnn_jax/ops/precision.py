"""The dtype of sums and parameters, and the precision of products."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from maskrcnn_jax.ops.cpu import bfloat16

# The precision of all matrix products and convolutions: float32 is float32. By default, TPUs would round the factors
# to bfloat16, and GPUs to TF32. It costs nothing in half precision.
PRECISION = jax.lax.Precision.HIGHEST


def at_least_float32(dtype: DTypeLike) -> np.dtype:
    """Return float32, or float64 for float64: the dtype of parameters, sums and losses of a network."""
    return jnp.promote_types(dtype, jnp.float32)


def bfloat16_is_faster() -> bool:
    """Return whether networks are faster in bfloat16 than in float32 where JAX runs them by default."""
    return jax.default_backend() != "cpu" or bfloat16.has_products()
