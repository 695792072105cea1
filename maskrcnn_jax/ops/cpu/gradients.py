"""Gradients of convolutions, written as convolutions of the one layout that XLA has a fast kernel for on CPUs.

XLA brings other layouts into this one by itself, but not inside a conditional or a loop, where a gradient took 15 to
30 times as long.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from maskrcnn_jax.ops.precision import at_least_float32

# Images whose kernel gradient is computed at once, as channels of a convolution: of 14 x 14 cells, chunks of 32 are
# twice as fast as chunks of 256.
_CHUNK = 32


def input_gradient(
    x: Float[Array, "N H W K"], kernel: Float[Array, "S S K C"], gradient: Float[Array, "N _ _ C"], stride: int
) -> Float[Array, "N H W K"]:
    """Return the gradient of x: the gradient of the output, spread by the stride, with the rotated kernel."""
    side = len(kernel)
    before = side - 1 - (side - 1) // 2
    padding = [
        (before, size + side - 2 - (outputs - 1) * stride - before)
        for size, outputs in zip(x.shape[1:3], gradient.shape[1:3], strict=True)
    ]
    rotated = kernel[::-1, ::-1].swapaxes(2, 3)
    return _convolve(gradient, rotated, padding, lhs_dilation=(stride, stride))


def kernel_gradient(
    x: Float[Array, "N H W K"], kernel: Float[Array, "S S K C"], gradient: Float[Array, "N _ _ C"], stride: int
) -> Float[Array, "S S K C"]:
    """Return the gradient of the kernel: x convolved with the gradient of the output, with images as channels.

    Its sums are in float32 at least, also those of all chunks.
    """
    side = len(kernel)
    before = (side - 1) // 2
    padding = [
        (before, side + (outputs - 1) * stride - size - before)
        for size, outputs in zip(x.shape[1:3], gradient.shape[1:3], strict=True)
    ]

    def of_chunk(x, gradient):
        x, gradient = x.transpose(3, 1, 2, 0), gradient.transpose(1, 2, 0, 3)
        options = {"rhs_dilation": (stride, stride), "preferred_element_type": at_least_float32(x.dtype)}
        return _convolve(x, gradient, padding, **options).transpose(1, 2, 0, 3)

    # Each chunk takes rows from all parts of the batch, which may be sharded. The chunks are not a loop: devices that
    # wait for each other inside a loop can deadlock when there are fewer threads than devices.
    num_chunks = max(1, -(-len(x) // _CHUNK))
    rows = -(-len(x) // num_chunks)
    padding_rows = ((0, rows * num_chunks - len(x)), (0, 0), (0, 0), (0, 0))
    chunks = [jnp.pad(array, padding_rows).reshape(rows, num_chunks, *array.shape[1:]) for array in (x, gradient)]
    return sum(of_chunk(*(array[:, i] for array in chunks)) for i in range(num_chunks)).astype(kernel.dtype)


def _convolve(x, kernel, padding, **options):
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=layout, **options)
