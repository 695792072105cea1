"""Convolutions that keep the size up to their stride, in the form that is fast on the platform they run on.

XLA's convolutions are good on accelerators; there, only the first convolution and those of 1x1 have another form. On
CPUs the forms of ops/cpu/ are faster: Winograd's algorithm for wide 3x3 convolutions, or strips of products where the
processor multiplies bfloat16, gradients in one layout for the others, shifted products for depthwise ones. This module
alone decides which form runs.
"""

import functools

import jax
import jax.export
import jax.numpy as jnp
from jaxtyping import Array, Float

from maskrcnn_jax.ops.cpu import bfloat16
from maskrcnn_jax.ops.cpu.depthwise import depthwise, depthwise_gradients
from maskrcnn_jax.ops.cpu.gradients import input_gradient, kernel_gradient
from maskrcnn_jax.ops.cpu.winograd import conv3x3
from maskrcnn_jax.ops.matmul import matmul, matmul_on_cpu
from maskrcnn_jax.ops.precision import PRECISION, at_least_float32

# Channels from which Winograd's transforms cost less than the products they save, and from which strips of products
# beat XLA's convolution. Measured with 32, 64, 128 and 256.
_WIDE_CHANNELS = 128
# Inputs with more channels than these are no images.
_FEW_CHANNELS = 8


def conv2d(x: Float[Array, "N H W K"], kernel: Float[Array, "S S K C"], *, stride: int = 1) -> Float[Array, "N _ _ C"]:
    """Convolve with (S - 1) / 2 zeros on each side, as PyTorch does.

    Args:
        x: [N, H, W, K].
        kernel: [S, S, K, C], S odd.
        stride: of both axes.

    Returns:
        [N, ceil(H / stride), ceil(W / stride), C].
    """
    return _traced_once(x, kernel, stride)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv2d(x, kernel, stride):
    if kernel.shape[0] == 1:
        flat, product = (functools.partial(form, stride=stride) for form in (_flat_product, _product))
        return jax.lax.platform_dependent(x, kernel, cpu=flat, default=product)
    direct = functools.partial(_direct, stride=stride)
    if _suits_blocks(x, kernel, stride):
        return jax.lax.platform_dependent(x, kernel, cpu=direct, default=_by_blocks)
    if _is_wide(x, kernel, stride):
        wide = functools.partial(_wide, stride=stride)
        return jax.lax.platform_dependent(x, kernel, cpu=wide, default=direct)
    return direct(x, kernel)


_traced_once = jax.jit(_conv2d, static_argnums=2)  # for all layers of one shape


def _forward(x, kernel, stride):
    return _traced_once(x, kernel, stride), (x, kernel)


def _backward(stride, residuals, gradient):
    def pull_back(function):
        return lambda x, kernel, gradient: jax.vjp(function, x, kernel)[1](gradient)

    def by_layout(x, kernel, gradient):
        return input_gradient(x, kernel, gradient, stride), kernel_gradient(x, kernel, gradient, stride)

    x, kernel = residuals
    direct, cpu = pull_back(functools.partial(_direct, stride=stride)), by_layout
    if kernel.shape[0] == 1:
        direct, cpu = (pull_back(functools.partial(form, stride=stride)) for form in (_product, _flat_product))
    elif _suits_blocks(x, kernel, stride):
        direct = pull_back(_by_blocks)
    elif _is_wide(x, kernel, stride) and stride == 1:
        cpu = _with_derivative(bfloat16.conv3x3_gradients, direct) if _has_strips(x) else pull_back(_winograd)
    return jax.lax.platform_dependent(x, kernel, gradient, cpu=cpu, default=direct)


_conv2d.defvjp(_forward, _backward)


def _product(x, kernel, stride):
    """Apply a 1x1 convolution as a matrix product."""
    return jnp.matmul(x[:, ::stride, ::stride], kernel[0, 0], precision=PRECISION)


def _flat_product(x, kernel, stride):
    """Apply a 1x1 convolution as a product with the flattened map: with more axes, its gradient is slower on CPUs."""
    x = x[:, ::stride, ::stride]
    products = matmul_on_cpu(x.reshape(-1, x.shape[-1]), kernel[0, 0])
    return products.reshape(*x.shape[:-1], kernel.shape[-1])


def _suits_blocks(x, kernel, stride):
    return kernel.shape[0] % 4 == 3 and stride == 2 and x.shape[-1] <= _FEW_CHANNELS


def _by_blocks(x, kernel):
    """Convolve an image with stride 2 as its 2x2 blocks with stride 1.

    TPUs pad channels to 128, so the three of an image take as much memory as the twelve of a block, of which there are
    a quarter as many.
    """
    x = jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)))
    batch, height, width, channels = x.shape
    blocks = x.reshape(batch, height // 2, 2, width // 2, 2, channels).transpose(0, 1, 3, 2, 4, 5)
    blocks = blocks.reshape(batch, height // 2, width // 2, 4 * channels)
    # With a row and a column of zeros before it, the window covers whole blocks.
    half = (kernel.shape[0] + 1) // 2
    window = jnp.pad(kernel, ((1, 0), (1, 0), (0, 0), (0, 0))).reshape(half, 2, half, 2, *kernel.shape[2:])
    window = window.transpose(0, 2, 1, 3, 4, 5).reshape(half, half, 4 * channels, -1)
    padding = [(half // 2, half - 1 - half // 2)] * 2
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(blocks, window, (1, 1), padding, dimension_numbers=layout, precision=PRECISION)


def _is_wide(x, kernel, stride):
    # The strips depend on the number of maps, which is a symbol in exported programs.
    countable = not jax.export.is_symbolic_dim(x.shape[0])
    large = min(kernel.shape[2:]) >= _WIDE_CHANNELS
    return len(kernel) == 3 and large and countable and (stride == 1 or x.dtype == jnp.bfloat16)


def _has_strips(x):
    return x.dtype == jnp.bfloat16 and bfloat16.has_tiles()


def _with_derivative(form, plain):
    """Return ``form`` with the derivative of ``plain``, which computes the same; moving bits loses its own."""
    function = jax.custom_jvp(form)

    @function.defjvp
    def _jvp(primals, tangents):
        return function(*primals), jax.jvp(plain, primals, tangents)[1]

    return function


def _wide(x, kernel, stride):
    """Apply a wide 3x3 convolution on a CPU."""
    if _has_strips(x):
        strips, direct = (functools.partial(form, stride=stride) for form in (bfloat16.convolve, _direct))
        return _with_derivative(strips, direct)(x, kernel)
    return _winograd(x, kernel) if stride == 1 else _direct(x, kernel, stride)


def _winograd(x, kernel):
    """Apply a 3x3 convolution by Winograd's algorithm, in which half precision would lose too many digits."""
    wide = at_least_float32(x.dtype)
    return conv3x3(x.astype(wide), kernel.astype(wide)).astype(x.dtype)


def patch_conv2d(x: Float[Array, "N H W K"], kernel: Float[Array, "S S K C"]) -> Float[Array, "N _ _ C"]:
    """Convolve with a stride of the window's side and no padding, as a product with each patch.

    Args:
        x: [N, H, W, K].
        kernel: [S, S, K, C].

    Returns:
        [N, H // S, W // S, C]; rows and columns that fill no patch are left out.
    """
    side, channels = kernel.shape[0], x.shape[-1]
    height, width = (size // side for size in x.shape[1:3])
    patches = x[:, : height * side, : width * side].reshape(-1, height, side, width, side, channels)
    patches = patches.transpose(0, 1, 3, 2, 4, 5).reshape(-1, height, width, side * side * channels)
    return matmul(patches, kernel.reshape(-1, kernel.shape[-1]))


def depthwise_conv2d(
    x: Float[Array, "N H W K"], kernel: Float[Array, "S S 1 K"], *, stride: int = 1
) -> Float[Array, "N _ _ K"]:
    """Convolve each channel with a window of its own, padded as :func:`conv2d` does.

    Args:
        x: [N, H, W, K].
        kernel: [S, S, 1, K], S odd.
        stride: of both axes.

    Returns:
        [N, ceil(H / stride), ceil(W / stride), K].
    """
    return _depthwise_traced_once(x, kernel, stride)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _depthwise(x, kernel, stride):
    direct, shifted = (functools.partial(form, stride=stride) for form in (_depthwise_direct, depthwise))
    return jax.lax.platform_dependent(x, kernel, cpu=shifted, default=direct)


_depthwise_traced_once = jax.jit(_depthwise, static_argnums=2)


def _depthwise_forward(x, kernel, stride):
    return _depthwise_traced_once(x, kernel, stride), (x, kernel)


def _depthwise_backward(stride, residuals, gradient):
    def direct(x, kernel, gradient):
        return jax.vjp(functools.partial(_depthwise_direct, stride=stride), x, kernel)[1](gradient)

    shifted = functools.partial(depthwise_gradients, stride=stride)
    return jax.lax.platform_dependent(*residuals, gradient, cpu=shifted, default=direct)


_depthwise.defvjp(_depthwise_forward, _depthwise_backward)


def _depthwise_direct(x, kernel, stride):
    return _direct(x, kernel, stride, feature_group_count=x.shape[-1])


def _direct(x, kernel, stride, **options):
    padding = [((kernel.shape[0] - 1) // 2,) * 2] * 2
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=layout, precision=PRECISION, **options
    )
