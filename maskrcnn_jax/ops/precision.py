"""The dtype of sums and parameters."""

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike


def at_least_float32(dtype: DTypeLike) -> np.dtype:
    """Return float32, or float64 for float64: the dtype of parameters, sums and losses of a network."""
    return jnp.promote_types(dtype, jnp.float32)
