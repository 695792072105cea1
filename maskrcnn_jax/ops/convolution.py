"""Convolutions that keep the size up to their stride, in the form that is fast where they run.

XLA's convolutions are good on accelerators. On CPUs wide 3x3 convolutions are faster by Winograd's algorithm, and the
gradients of the others are written as convolutions of the one layout that XLA has a fast kernel for. It brings others
into that layout by itself, but not inside a conditional or a loop, where a gradient took 15 to 30 times as long.
Depthwise ones have no fast kernel there at all, and are written as sums of shifted products.
"""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from maskrcnn_jax.ops.cpu.winograd import conv3x3
from maskrcnn_jax.ops.dtypes import at_least_float32

# Channels from which Winograd's transforms cost less than the products they save. Measured with 32, 64, 128 and 256.
_WINOGRAD_CHANNELS = 128
# Maps whose kernel gradient is computed at once on a CPU, where they are the channels of a convolution: 32 at a time
# are 2 times as fast as 256, of 14 x 14 cells.
_GRADIENT_CHUNK = 32


def conv2d(x: jax.Array, kernel: jax.Array, *, stride: int = 1) -> jax.Array:
    """Convolve with (side of the kernel - 1) / 2 zeros around, on all sides alike as PyTorch does.

    Args:
      x: [N, H, W, K].
      kernel: [S, S, K, C], S odd.
      stride: of both axes.

    Returns:
      [N, ceil(H / stride), ceil(W / stride), C].
    """
    if kernel.shape[0] == 1:
        # On the flattened map, because the gradient of a product with more axes is slower.
        x = x[:, ::stride, ::stride]
        return (x.reshape(-1, x.shape[-1]) @ kernel[0, 0]).reshape(*x.shape[:-1], kernel.shape[-1])
    return _conv2d(x, kernel, stride)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv2d(x, kernel, stride):
    direct = functools.partial(_direct, stride=stride)
    if _suits_winograd(x, kernel, stride):
        return jax.lax.platform_dependent(x, kernel, cpu=conv3x3, default=direct)
    return direct(x, kernel)


def _forward(x, kernel, stride):
    return _conv2d(x, kernel, stride), (x, kernel)


def _backward(stride, residuals, gradient):
    def direct(x, kernel, gradient):
        return jax.vjp(functools.partial(_direct, stride=stride), x, kernel)[1](gradient)

    def by_winograd(x, kernel, gradient):
        return jax.vjp(conv3x3, x, kernel)[1](gradient)

    def by_layout(x, kernel, gradient):
        return _input_gradient(x, kernel, gradient, stride), _kernel_gradient(x, kernel, gradient, stride)

    cpu = by_winograd if _suits_winograd(*residuals, stride) else by_layout
    return jax.lax.platform_dependent(*residuals, gradient, cpu=cpu, default=direct)


_conv2d.defvjp(_forward, _backward)
_conv2d = jax.jit(_conv2d, static_argnums=2)  # so that layers of one shape are traced once


def _input_gradient(x, kernel, gradient, stride):
    """Return the gradient of x: the gradient of the output, spread by the stride, with the turned kernel."""
    side = len(kernel)
    before = side - 1 - (side - 1) // 2
    padding = [
        (before, size + side - 2 - (outputs - 1) * stride - before)
        for size, outputs in zip(x.shape[1:3], gradient.shape[1:3], strict=True)
    ]
    turned = kernel[::-1, ::-1].swapaxes(2, 3)
    return _convolve(gradient, turned, padding, lhs_dilation=(stride, stride))


def _kernel_gradient(x, kernel, gradient, stride):
    """Return the gradient of the kernel: x with the gradient of the output as the kernel, and images as channels."""
    side = len(kernel)
    before = (side - 1) // 2
    padding = [
        (before, side + (outputs - 1) * stride - size - before)
        for size, outputs in zip(x.shape[1:3], gradient.shape[1:3], strict=True)
    ]

    def of_some(x, gradient):
        x, gradient = x.transpose(3, 1, 2, 0), gradient.transpose(1, 2, 0, 3)
        return _convolve(x, gradient, padding, rhs_dilation=(stride, stride)).transpose(1, 2, 0, 3)

    # Every chunk takes some rows of all parts of the batch, which may lie on several devices. Not a loop: devices that
    # wait for each other inside a loop can wait for ever when they have fewer threads than they are.
    num_chunks = max(1, -(-len(x) // _GRADIENT_CHUNK))
    rows = -(-len(x) // num_chunks)
    padding_rows = ((0, rows * num_chunks - len(x)), (0, 0), (0, 0), (0, 0))
    chunks = [jnp.pad(array, padding_rows).reshape(rows, num_chunks, *array.shape[1:]) for array in (x, gradient)]
    return sum(of_some(*(array[:, i] for array in chunks)) for i in range(num_chunks))


def depthwise_conv2d(x: jax.Array, kernel: jax.Array, *, stride: int = 1) -> jax.Array:
    """Convolve each channel with a window of its own, with zeros around as in :func:`conv2d`.

    Args:
      x: [N, H, W, K].
      kernel: [S, S, 1, K], S odd.
      stride: of both axes.

    Returns:
      [N, ceil(H / stride), ceil(W / stride), K].
    """
    return _depthwise(x, kernel, stride)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _depthwise(x, kernel, stride):
    direct, shifted = (functools.partial(form, stride=stride) for form in (_depthwise_direct, _depthwise_shifted))
    return jax.lax.platform_dependent(x, kernel, cpu=shifted, default=direct)


def _depthwise_forward(x, kernel, stride):
    return _depthwise(x, kernel, stride), (x, kernel)


def _depthwise_backward(stride, residuals, gradient):
    def direct(x, kernel, gradient):
        return jax.vjp(functools.partial(_depthwise_direct, stride=stride), x, kernel)[1](gradient)

    shifted = functools.partial(_depthwise_shifted_gradients, stride=stride)
    return jax.lax.platform_dependent(*residuals, gradient, cpu=shifted, default=direct)


_depthwise.defvjp(_depthwise_forward, _depthwise_backward)
_depthwise = jax.jit(_depthwise, static_argnums=2)


def _depthwise_direct(x, kernel, stride):
    return _direct(x, kernel, stride, feature_group_count=x.shape[-1])


def _depthwise_shifted(x, kernel, stride):
    """Return the sum of S * S products, each of x shifted and one cell of the window.

    In the shapes of MobileNetV3 10 to 100 times as fast as XLA's own on CPUs, and the whole network 3 times.
    """
    height, width = (-(-size // stride) for size in x.shape[1:3])
    padding = (len(kernel) - 1) // 2
    padded = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    return _sum_of_shifts(padded, kernel, (height, width), stride)


def _sum_of_shifts(x, kernel, shape, stride=1):
    """Return [N, *shape, K], the depthwise convolution of x [N, H, W, K] without any padding."""
    dtype = at_least_float32(x.dtype)  # of the sum
    height, width = ((size - 1) * stride + 1 for size in shape)
    total = 0
    for i, j in np.ndindex(kernel.shape[:2]):
        end = (x.shape[0], i + height, j + width, x.shape[-1])
        window = jax.lax.slice(x, (0, i, j, 0), end, (1, stride, stride, 1))
        total = total + window.astype(dtype) * kernel[i, j].astype(dtype).reshape(1, 1, 1, -1)
    return total.astype(x.dtype)


def _depthwise_shifted_gradients(x, kernel, gradient, stride):
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

    # A loop, for S * S reductions compile slowly; devices that share the batch meet after it, in the sum over images.
    def of_cell(index):
        corner = (0, index // side, index % side, 0)
        window = jax.lax.dynamic_slice(padded, corner, (len(x), height, width, x.shape[-1]))[:, ::stride, ::stride]
        return jnp.sum(window.astype(dtype) * gradient.astype(dtype), axis=(1, 2))  # [N, K]

    of_cells = jnp.sum(jax.lax.map(of_cell, jnp.arange(side * side)), axis=1)
    return (
        _sum_of_shifts(spread, kernel[::-1, ::-1], x.shape[1:3]),
        of_cells.reshape(kernel.shape).astype(kernel.dtype),
    )


def _suits_winograd(x, kernel, stride):
    # Half precision would lose more digits in the transforms than it has to spare.
    precise = jnp.finfo(x.dtype).bits >= 32
    # Its strips depend on the number of maps, which exported programs leave open.
    countable = not jax.export.is_symbolic_dim(x.shape[0])
    large = min(kernel.shape[2:]) >= _WINOGRAD_CHANNELS
    return kernel.shape[0] == 3 and stride == 1 and large and precise and countable


def _direct(x, kernel, stride, **options):
    padding = (kernel.shape[0] - 1) // 2
    return _convolve(x, kernel, [(padding, padding)] * 2, window_strides=(stride, stride), **options)


def _convolve(x, kernel, padding, window_strides=(1, 1), **options):
    """Convolve in the layout that has a fast kernel on CPUs."""
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, window_strides, padding, dimension_numbers=layout, **options)
