"""Convolutions that keep the size up to their stride, in the form that is fast where they run.

XLA's convolutions are good on accelerators. On CPUs its gradients are several times slower than its matrix products,
so there wide 3x3 convolutions go through Winograd's algorithm, and others get the gradient of their kernel in parts.
"""

import functools

import jax
import jax.numpy as jnp

from maskrcnn_jax.ops.winograd import conv3x3

# Channels from which Winograd's transforms cost less than the products they save. Measured with 32, 64, 128 and 256.
_WINOGRAD_CHANNELS = 128
# Maps whose kernel gradient is computed at once on a CPU: XLA treats the batch as the window of that convolution, and
# is 6 times slower on a batch of 256 maps of 14 x 14 than on 16 batches of 16.
_GRADIENT_CHUNK = 16


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

    def in_parts(x, kernel, gradient):
        x_gradient = jax.vjp(lambda x: _direct(x, kernel, stride), x)[1](gradient)[0]
        starts = range(0, x.shape[0], _GRADIENT_CHUNK)
        # Unrolled: inside a loop XLA's CPU convolutions run on one thread.
        parts = [(x[i : i + _GRADIENT_CHUNK], gradient[i : i + _GRADIENT_CHUNK]) for i in starts]
        # The convolution is linear in the kernel: of its values only the shape matters here.
        return x_gradient, sum(direct(part, jnp.zeros_like(kernel), part_gradient)[1] for part, part_gradient in parts)

    cpu = by_winograd if _suits_winograd(*residuals, stride) else in_parts
    return jax.lax.platform_dependent(*residuals, gradient, cpu=cpu, default=direct)


_conv2d.defvjp(_forward, _backward)


def _suits_winograd(x, kernel, stride):
    # Half precision would lose more digits in the transforms than it has to spare.
    precise = jnp.finfo(x.dtype).bits >= 32
    return kernel.shape[0] == 3 and stride == 1 and min(kernel.shape[2:]) >= _WINOGRAD_CHANNELS and precise


def _direct(x, kernel, stride):
    padding = (kernel.shape[0] - 1) // 2
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        ((padding, padding), (padding, padding)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
