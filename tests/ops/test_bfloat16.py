"""bfloat16 on CPUs: values and gradients on any processor, and which processors and programs have these forms."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskrcnn_jax.ops.convolution import conv2d
from maskrcnn_jax.ops.cpu import bfloat16
from maskrcnn_jax.ops.matmul import matmul
from maskrcnn_jax.ops.precision import bfloat16_is_faster

INTEL = "vendor_id\t: GenuineIntel\nflags\t\t: fpu avx512f avx512_bf16{}\n"
AMD = "vendor_id\t: AuthenticAMD\nflags\t\t: fpu avx2{}\n"


@pytest.fixture
def processor(tmp_path, monkeypatch):
    """Return a function that makes a text the description of the processor, or a list of features an Intel one."""

    def describe(text):
        path = tmp_path / "cpuinfo"
        path.write_text(text)
        monkeypatch.setattr(bfloat16, "_CPUINFO", path)
        bfloat16._processor.cache_clear()
        jax.clear_caches()

    yield describe
    monkeypatch.undo()
    bfloat16._processor.cache_clear()
    jax.clear_caches()


def draw(*shapes):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in shapes]


def assert_rounded(arrays, exact):
    """Check that bfloat16 arrays are those of float32, rounded."""
    for array, other in zip(arrays, exact, strict=True):
        assert array.dtype == jnp.bfloat16 and array.shape == other.shape
        np.testing.assert_allclose(
            array.astype(jnp.float32), other, rtol=2**-8, atol=2e-4 * float(jnp.abs(other).max())
        )


def direct(x, kernel, stride):
    before = (len(kernel) - 1) // 2
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (stride,) * 2, [(before,) * 2] * 2, dimension_numbers=layout)


def in_float32(function, *arrays):
    return function(*(array.astype(jnp.float32) for array in arrays))


@pytest.mark.parametrize(
    ("shape", "side", "stride"),
    [
        *(((1, 9, 13, 5), side, stride) for side in (1, 3, 5, 7) for stride in (1, 2, 3)),
        ((2, 40, 53, 3), 3, 1),  # several strips
        ((2, 101, 90, 3), 3, 2),
        ((30, 7, 7, 4), 3, 1),
        ((1, 1, 1, 4), 3, 2),
    ],
)
def test_strips_convolve(shape, side, stride):
    x, kernel = draw(shape, (side, side, shape[-1], 6))
    out = jax.jit(functools.partial(bfloat16.convolve, stride=stride))(x, kernel)
    assert_rounded([out], [in_float32(functools.partial(direct, stride=stride), x, kernel)])


@pytest.mark.parametrize("shape", [(1, 9, 13, 5), (2, 40, 53, 3), (30, 7, 7, 4)])
def test_strips_have_the_gradients_of_a_convolution(shape):
    x, kernel, gradient = draw(shape, (3, 3, shape[-1], 6), (*shape[:3], 6))
    gradients = jax.jit(bfloat16.conv3x3_gradients)(x, kernel, gradient)

    def exact(x, kernel, gradient):
        return jax.vjp(functools.partial(direct, stride=1), x, kernel)[1](gradient)

    assert_rounded(gradients, in_float32(exact, x, kernel, gradient))


@pytest.mark.parametrize(("shape", "kernel_shape"), [((7, 5), (5, 3)), ((2, 3, 4, 5), (5, 2, 2, 3)), ((5,), (5, 3))])
def test_products_are_rounded_once(processor, shape, kernel_shape):
    processor(INTEL.format(" amx_bf16"))
    arrays = draw(shape, kernel_shape, (*shape[:-1], *kernel_shape[1:]))

    def with_gradients(product, x, kernel, gradient):
        result, pull_back = jax.vjp(product, x, kernel)
        return result, *pull_back(gradient)

    exact = in_float32(functools.partial(with_gradients, functools.partial(jnp.tensordot, axes=1)), *arrays)
    assert_rounded(with_gradients(matmul, *arrays), exact)


@pytest.mark.parametrize(
    ("side", "stride", "channels"), [(1, 1, 8), (1, 2, 8), (3, 1, 128), (3, 2, 128), (3, 1, 8), (7, 2, 3)]
)
def test_convolutions_and_their_gradients_agree_in_all_forms(processor, side, stride, channels):
    processor(INTEL.format(" amx_bf16"))
    x, kernel = draw((1, 9, 11, channels), (side, side, channels, 128))
    (gradient,) = draw(direct(x, kernel, stride).shape)

    def with_gradients(convolve, x, kernel, gradient):
        result, pull_back = jax.vjp(functools.partial(convolve, stride=stride), x, kernel)
        return result, *pull_back(gradient)

    assert_rounded(
        with_gradients(conv2d, x, kernel, gradient),
        in_float32(functools.partial(with_gradients, direct), x, kernel, gradient),
    )


@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_of_many_maps_are_rounded_once(stride):
    """XLA's convolutions take them in chunks, on every processor."""
    x, kernel = draw((100, 7, 7, 16), (3, 3, 16, 16))
    (gradient,) = draw(direct(x, kernel, stride).shape)

    def gradient_of_kernel(convolve, x, kernel, gradient):
        return jax.vjp(lambda kernel: convolve(x, kernel, stride=stride), kernel)[1](gradient)

    exact = in_float32(functools.partial(gradient_of_kernel, direct), x, kernel, gradient)
    assert_rounded(gradient_of_kernel(conv2d, x, kernel, gradient), exact)


@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_have_gradients(processor, stride):
    processor(INTEL.format(" amx_bf16"))
    x, kernel = (array.astype(jnp.float32) for array in draw((1, 5, 5, 128), (3, 3, 128, 128)))

    def penalty(kernel, dtype):
        def loss(x):
            return jnp.sum(conv2d(x.astype(dtype), kernel.astype(dtype), stride=stride).astype(jnp.float32) ** 2)

        return jnp.sum(jax.grad(loss)(x) ** 2)

    found, wanted = (jax.grad(penalty)(kernel, dtype) for dtype in (jnp.bfloat16, jnp.float32))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=0.02 * float(jnp.abs(wanted).max()))


def test_no_rows_have_gradients_too(processor):
    processor(INTEL.format(" amx_bf16"))
    x, kernel = draw((0, 7), (7, 3))
    by_x, by_kernel = jax.grad(lambda x, kernel: jnp.sum(matmul(x, kernel)), (0, 1))(x, kernel)
    assert by_x.shape == x.shape and by_kernel.shape == kernel.shape and not by_kernel.any()


@pytest.mark.parametrize(
    ("text", "products", "tiles"),
    [
        (INTEL.format(" amx_bf16 amx_tile"), True, True),
        (INTEL.format(""), False, False),
        (AMD.format(" avx512_bf16"), True, False),
        (AMD.format(""), False, False),
        ("processor\t: 0\nFeatures\t: fp asimd bf16\n", False, False),
        ("", False, False),
    ],
)
def test_processors_that_multiply_bfloat16_are_known_by_their_features(processor, text, products, tiles):
    processor(text)
    assert (bfloat16.has_products(), bfloat16.has_tiles()) == (products, tiles)
    assert bfloat16_is_faster() is products  # the tests run on CPUs


def test_a_system_that_does_not_describe_its_processor_has_no_such_products(processor, tmp_path):
    processor("")
    (tmp_path / "cpuinfo").unlink()
    assert not bfloat16.has_products() and not bfloat16.has_tiles()


def lowered(platform, dtype):
    """Return the operations of a small network's gradient, lowered for a platform, but for unused constants."""

    def network(x, kernels):
        for kernel, stride in zip(kernels, (1, 1, 2, 1), strict=True):
            x = conv2d(x, kernel, stride=stride)
        return jnp.sum(matmul(x, kernels[0][0, 0]).astype(jnp.float32))

    shapes = [(side, side, 128, 128) for side in (1, 3, 3, 5)]
    x, *kernels = (array.astype(dtype) for array in draw((1, 8, 8, 128), *shapes))
    text = jax.jit(jax.grad(network, (0, 1))).trace(x, kernels).lower(lowering_platforms=(platform,)).as_text()
    return [re.sub(r"%\w+", "%", line) for line in text.splitlines() if "stablehlo.constant" not in line]


@pytest.mark.parametrize(
    ("platform", "dtype", "is_the_same"),
    [
        ("tpu", jnp.bfloat16, True),
        ("cuda", jnp.bfloat16, True),
        ("cpu", jnp.float32, True),
        ("cpu", jnp.bfloat16, False),
    ],
)
def test_the_processor_changes_only_programs_of_bfloat16_for_cpus(processor, platform, dtype, is_the_same):
    """Hosts of a cluster may have different processors, and must agree on the programs for its accelerators."""
    programs = []
    for features in ("", " amx_bf16"):
        processor(INTEL.format(features))
        programs.append(lowered(platform, dtype))
    assert (programs[0] == programs[1]) is is_the_same
