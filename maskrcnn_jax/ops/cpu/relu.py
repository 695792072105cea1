"""ReLU with a gradient that needs its output alone."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.custom_jvp
def relu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Return the positive part of x.

    The gradient depends on the output, which the next layer keeps anyway. That of jax.nn.relu depends on the input,
    and a training step then keeps both: a fifth of its memory. Without the barrier XLA would compute the output again
    from the input. Only on CPUs does the barrier last until operations are fused (see training/step.py).
    """
    return jnp.maximum(x, 0)


@relu.defjvp
def _relu_jvp(primals, tangents):
    positive = jax.lax.optimization_barrier(relu(*primals))
    return positive, jnp.where(positive > 0, tangents[0], 0)
