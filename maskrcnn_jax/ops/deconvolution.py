"""The end of the mask head, a deconvolution and a filter per RoI, for a few RoIs at a time.

The enlarged maps of 256 RoIs take 200 MB, and as much again for their gradient. Neither is ever whole in memory: the
gradient computes each chunk again.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from maskrcnn_jax.ops.cpu.relu import relu
from maskrcnn_jax.ops.matmul import matmul
from maskrcnn_jax.ops.precision import PRECISION, at_least_float32

# RoIs per image that are enlarged at once.
CHUNK = 8


@jax.custom_vjp
def enlarged_logits(
    x: Float[Array, "B R h w K"],
    filters: Float[Array, "B R K2"],
    kernel: Float[Array, "K 2 2 K2"],
    bias: Float[Array, " K2"],
) -> Float[Array, "B R 2*h 2*w"]:
    """Apply the deconvolution, a ReLU and one filter per RoI.

    Args:
        x: [B, R, h, w, K].
        filters: [B, R, K2].
        kernel: [K, 2, 2, K2] of the deconvolution, whose stride is 2: each cell gives its own 2x2 block.
        bias: [K2].

    Returns:
        [B, R, 2 h, 2 w], float32 or wider.
    """

    def visit(_, chunk):
        x, filters = chunk
        return None, product("brhwijk,brk->brhiwj", _enlarge(x, kernel, bias), filters)

    _, logits = jax.lax.scan(visit, None, (_cut(x), _cut(filters)))
    batch, num_rois, height, width, _ = x.shape
    return logits.swapaxes(0, 1).reshape(batch, num_rois, 2 * height, 2 * width)


def _enlarged_logits_forward(x, filters, kernel, bias):
    return enlarged_logits(x, filters, kernel, bias), (x, filters, kernel, bias)


def _enlarged_logits_backward(residuals, gradient):
    x, filters, kernel, bias = residuals
    batch, num_rois, height, width, _ = x.shape
    gradient = gradient.reshape(batch, num_rois, height, 2, width, 2).astype(x.dtype)

    def visit(sums, chunk):
        x, filters, gradient = chunk
        enlarged = _enlarge(x, kernel, bias)
        by_filters = product("brhiwj,brhwijk->brk", gradient, enlarged)
        inner = jnp.einsum("brhiwj,brk->brhwijk", gradient, filters, precision=PRECISION)
        inner = jnp.where(enlarged > 0, inner, 0)
        by_kernel = sums[0] + product("brhwl,brhwijk->lijk", x, inner)
        by_bias = sums[1] + jnp.sum(inner, axis=(0, 1, 2, 3, 4, 5), dtype=sums[1].dtype)
        by_x = product("brhwijk,lijk->brhwl", inner, kernel)
        return (by_kernel, by_bias), (by_x.astype(x.dtype), by_filters.astype(x.dtype))

    wide = at_least_float32(x.dtype)
    sums = jnp.zeros(kernel.shape, wide), jnp.zeros(bias.shape, wide)
    (by_kernel, by_bias), (by_x, by_filters) = jax.lax.scan(visit, sums, (_cut(x), _cut(filters), _cut(gradient)))
    return (
        by_x.swapaxes(0, 1).reshape(x.shape),
        by_filters.swapaxes(0, 1).reshape(filters.shape),
        by_kernel.astype(kernel.dtype),
        by_bias.astype(bias.dtype),
    )


enlarged_logits.defvjp(_enlarged_logits_forward, _enlarged_logits_backward)


def product(equation: str, *arrays: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return an einsum that is accumulated and returned in float32 or wider."""
    wide = at_least_float32(arrays[0].dtype)
    return jnp.einsum(equation, *arrays, precision=PRECISION, preferred_element_type=wide)


def _enlarge(x, kernel, bias):
    """Return the positive part of the deconvolution of x [B, R, h, w, K], [B, R, h, w, 2, 2, K2]."""
    return relu(matmul(x, kernel) + bias.reshape(1, 1, 1, 1, 1, 1, -1))


def _cut(array):
    """Arrange [B, R, ...] as [R / r, B, r, ...], where r is the largest divisor of R up to CHUNK."""
    batch, num_rois = array.shape[:2]
    size = max(r for r in range(1, CHUNK + 1) if num_rois % r == 0)
    return array.reshape(batch, num_rois // size, size, *array.shape[2:]).swapaxes(0, 1)
