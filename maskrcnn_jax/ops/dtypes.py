"""The dtypes that sums and parameters have."""

import jax.numpy as jnp


def at_least_float32(dtype: jnp.dtype) -> jnp.dtype:
    """Return the dtype of sums and parameters where ``dtype`` is that of the activations: float32 or float64."""
    return jnp.promote_types(dtype, jnp.float32)
