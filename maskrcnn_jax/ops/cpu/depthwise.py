"""Depthwise convolutions as sums of shifted products: XLA has no fast kernel for them on CPUs.

In the shapes of MobileNetV3 they are 10 to 100 times as fast as XLA's own, and the whole network 3 times; the 7x7
windows of ConvNeXt, 8 to 23 times.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from maskrcnn_jax.ops.precision import at_least_float32


def depthwise(x: Float[Array, "N H W K"], kernel: Float[Array, "S S 1 K"], stride: int) -> Float[Array, "N _ _ K"]:
    """Return the sum of S * S products, each of x shifted and one cell of the window."""
    height, width = (-(-size // stride) for size in x.shape[1:3])
    padding = (len(kernel) - 1) // 2
    padded = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    return _sum_of_shifts(padded, kernel, (height, width), stride)


def depthwise_gradients(
    x: Float[Array, "N H W K"], kernel: Float[Array, "S S 1 K"], gradient: Float[Array, "N _ _ K"], stride: int
) -> tuple[Float[Array, "N H W K"], Float[Array, "S S 1 K"]]:
    """Return the gradients of x and the kernel as sums of shifted products, too."""
    side, padding = len(kernel), (len(kernel) - 1) // 2
    height, width = ((size - 1) * stride + 1 for size in gradient.shape[1:3])
    margins = [
        (side - 1 - padding, size + padding - spread, stride - 1)
        for size, spread in zip(x.shape[1:3], (height, width), strict=True)
    ]
    spread = jax.lax.pad(gradient, jnp.zeros((), gradient.dtype), [(0, 0, 0), *margins, (0, 0, 0)])
    padded = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    dtype = at_least_float32(x.dtype)

    # A loop, because S * S reductions compile slowly. Sharded batches need no exchange inside it: the sum over images
    # comes after.
    def of_cell(index):
        corner = (0, index // side, index % side, 0)
        window = jax.lax.dynamic_slice(padded, corner, (len(x), height, width, x.shape[-1]))[:, ::stride, ::stride]
        return jnp.sum(window.astype(dtype) * gradient.astype(dtype), axis=(1, 2))  # [N, K]

    of_cells = jnp.sum(jax.lax.map(of_cell, jnp.arange(side * side)), axis=1)
    return (
        _sum_of_shifts(spread, kernel[::-1, ::-1], x.shape[1:3]),
        of_cells.reshape(kernel.shape).astype(kernel.dtype),
    )


def _sum_of_shifts(x, kernel, shape, stride=1):
    """Return [N, *shape, K], the depthwise convolution of x [N, H, W, K] without any padding."""
    dtype = at_least_float32(x.dtype)
    height, width = ((size - 1) * stride + 1 for size in shape)
    total: Any = 0
    for i, j in np.ndindex(kernel.shape[:2]):
        end = (x.shape[0], i + height, j + width, x.shape[-1])
        window = jax.lax.slice(x, (0, i, j, 0), end, (1, stride, stride, 1))
        total = total + window.astype(dtype) * kernel[i, j].astype(dtype).reshape(1, 1, 1, -1)
    return total.astype(x.dtype)
