"""Matrix products in the form that is fast on the platform they run on."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from maskrcnn_jax.ops.cpu import bfloat16
from maskrcnn_jax.ops.precision import PRECISION


def matmul(x: Float[Array, "*B K"], kernel: Float[Array, "K ..."]) -> Float[Array, "..."]:
    """Contract the last axis of x with the first of kernel."""
    if x.dtype == jnp.bfloat16 and bfloat16.has_products():
        return _traced_once(x, kernel)
    return _contract(x, kernel)


def _contract(x, kernel):
    return jnp.tensordot(x, kernel, axes=1, precision=PRECISION)


@jax.custom_vjp
def _by_platform(x, kernel):
    return jax.lax.platform_dependent(x, kernel, cpu=bfloat16.matmul, default=_contract)


_traced_once = jax.jit(_by_platform)  # for all layers of one shape


def _forward(x, kernel):
    return _traced_once(x, kernel), (x, kernel)


def _backward(residuals, gradient):
    def contract_gradients(x, kernel, gradient):
        return jax.vjp(_contract, x, kernel)[1](gradient)

    forms = {"cpu": bfloat16.matmul_gradients, "default": contract_gradients}
    return jax.lax.platform_dependent(*residuals, gradient, **forms)


_by_platform.defvjp(_forward, _backward)
