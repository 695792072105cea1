"""Matrix products in the form that is fast on the platform they run on."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from maskrcnn_jax.ops.cpu import bfloat16
from maskrcnn_jax.ops.precision import PRECISION


def matmul(x: Float[Array, "*B K"], kernel: Float[Array, "K ..."]) -> Float[Array, "..."]:
    """Contract the last axis of x with the first of kernel."""
    # Whatever this processor is: the hosts of a cluster must agree on the programs for its accelerators.
    return _traced_once(x, kernel) if x.dtype == jnp.bfloat16 else _contract(x, kernel)


def matmul_on_cpu(x: Float[Array, "*B K"], kernel: Float[Array, "K ..."]) -> Float[Array, "..."]:
    """Compute :func:`matmul` in the form for CPUs, inside of code that only they run."""
    in_hardware = x.dtype == jnp.bfloat16 and bfloat16.has_products()
    return bfloat16.matmul(x, kernel) if in_hardware else _contract(x, kernel)


def _contract(x, kernel):
    return jnp.tensordot(x, kernel, axes=1, precision=PRECISION)


@jax.custom_vjp
def _by_platform(x, kernel):
    return jax.lax.platform_dependent(x, kernel, cpu=matmul_on_cpu, default=_contract)


_traced_once = jax.jit(_by_platform)  # for all layers of one shape


def _forward(x, kernel):
    return _traced_once(x, kernel), (x, kernel)


def _backward(residuals, gradient):
    def pull_back(form):
        return lambda x, kernel, gradient: jax.vjp(form, x, kernel)[1](gradient)

    cpu, default = pull_back(matmul_on_cpu), pull_back(_contract)
    return jax.lax.platform_dependent(*residuals, gradient, cpu=cpu, default=default)


_by_platform.defvjp(_forward, _backward)
