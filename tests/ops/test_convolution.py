"""Convolutions beside lax.conv_general_dilated, with their gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from maskrcnn_jax.ops import convolution
from maskrcnn_jax.ops.convolution import conv2d, depthwise_conv2d
from maskrcnn_jax.ops.cpu import winograd
from maskrcnn_jax.ops.cpu.winograd import conv3x3
from tests.programs import collectives_in_loops


def direct(x, kernel, stride=1):
    padding = (kernel.shape[0] - 1) // 2
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), ((padding, padding),) * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def draw(shape, kernel_shape, dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    scale = np.prod(kernel_shape[:3]) ** -0.5
    return jnp.asarray(rng.normal(size=shape), dtype), jnp.asarray(rng.normal(size=kernel_shape) * scale, dtype)


def assert_same(ours, reference, x, kernel, tolerance):
    """Compare outputs and both gradients, relative to their largest values."""
    (out, pull), (wanted, reference_pull) = jax.vjp(ours, x, kernel), jax.vjp(reference, x, kernel)
    gradient = jnp.asarray(np.random.default_rng(1).normal(size=wanted.shape), wanted.dtype)
    for a, b in zip((out, *pull(gradient)), (wanted, *reference_pull(gradient)), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * float(jnp.abs(b).max()))


# One map of several strips, several maps a strip with the last not full, sizes that tiles divide and do not.
@pytest.mark.parametrize("shape", [(2, 70, 67, 3), (35, 14, 14, 4), (1, 1, 1, 2), (3, 4, 8, 5), (1, 3, 1100, 2)])
def test_winograd_is_the_convolution(shape):
    with jax.enable_x64(True):
        assert_same(conv3x3, direct, *draw(shape, (3, 3, shape[-1], 6)), 1e-13)


def test_winograd_rounds_little():
    """In float32 2e-6 of the largest output, an eighth of what the textbook's points give."""
    with jax.enable_x64(True):
        x, kernel = draw((1, 24, 24, 256), (3, 3, 256, 32), np.float32)
        exact = direct(x.astype(jnp.float64), kernel.astype(jnp.float64))
        error = float(jnp.abs(conv3x3(x, kernel) - exact).max() / jnp.abs(exact).max())
    assert error < 4e-6


@pytest.mark.parametrize(("size", "stride"), [(1, 1), (1, 2), (3, 1), (3, 2), (7, 2)])
@pytest.mark.parametrize("shape", [(2, 11, 14, 3), (37, 6, 5, 3)])
def test_every_form_is_the_convolution(size, stride, shape, monkeypatch):
    reference = functools.partial(direct, stride=stride)
    with jax.enable_x64(True):
        x, kernel = draw(shape, (size, size, 3, 4))
        assert_same(functools.partial(conv2d, stride=stride), reference, x, kernel, 1e-13)
        monkeypatch.setattr(convolution, "_WIDE_CHANNELS", 1)
        assert_same(functools.partial(conv2d, stride=stride), reference, x, kernel, 1e-13)


@pytest.mark.parametrize("size", [3, 7, 11])
@pytest.mark.parametrize("shape", [(2, 12, 14, 3), (1, 11, 9, 4), (1, 1, 2, 3)])
def test_accelerators_convolve_the_blocks_of_an_image(size, shape):
    with jax.enable_x64(True):
        reference = functools.partial(direct, stride=2)
        assert_same(convolution._by_blocks, reference, *draw(shape, (size, size, shape[-1], 5)), 1e-13)


@pytest.mark.parametrize("stride", [1, 2])
def test_accelerators_convolve_single_cells_by_a_product(stride):
    forms = (functools.partial(form, stride=stride) for form in (convolution._product, direct))
    with jax.enable_x64(True):
        assert_same(*forms, *draw((2, 5, 6, 3), (1, 1, 3, 4)), 1e-13)


@pytest.mark.parametrize(
    ("shape", "size", "stride", "form"),
    [((1, 8, 8, 3), 7, 2, "stablehlo.transpose"), ((1, 8, 8, 64), 1, 1, "stablehlo.dot_general")],
)
def test_tpus_get_their_forms(shape, size, stride, form):
    """Read from the program for TPUs, which is lowered on any machine."""
    x, kernel = draw(shape, (size, size, shape[-1], 8), jnp.bfloat16)
    program = jax.jit(functools.partial(conv2d, stride=stride)).trace(x, kernel).lower(lowering_platforms=("tpu",))
    assert form in program.as_text()


@pytest.mark.parametrize(("size", "stride"), [(3, 1), (3, 2), (7, 2)])
def test_gradients_inside_a_conditional_have_the_layout_of_the_fast_kernel(size, stride):
    x, kernel = draw((40, 20, 20, 8), (size, size, 8, 8), np.float32)

    def loss(x, kernel, double):
        convolve = functools.partial(conv2d, stride=stride)
        return jnp.sum(jnp.square(jax.lax.cond(double, lambda: convolve(2 * x, kernel), lambda: convolve(x, kernel))))

    text = jax.jit(jax.grad(loss, (0, 1))).lower(x, kernel, True).compile().as_text()
    convolutions = [line for line in text.splitlines() if " convolution(" in line]
    assert len(convolutions) >= 4
    assert all("dim_labels=b01f_01io->b01f" in line and "rhs_reversal" not in line for line in convolutions)


def test_narrow_convolutions_stay_direct(monkeypatch):
    def refuse(x, kernel):
        raise AssertionError("Winograd was used")

    monkeypatch.setattr(convolution, "conv3x3", refuse)
    conv2d(*draw((1, 4, 4, 16), (3, 3, 16, 16), np.float32))
    with pytest.raises(AssertionError, match="Winograd"):
        conv2d(*draw((1, 4, 4, 128), (3, 3, 128, 128), np.float32))


def test_wide_convolutions_in_half_precision_round_only_their_result():
    x, kernel = draw((1, 9, 9, 128), (3, 3, 128, 128), jnp.bfloat16)
    out = conv2d(x, kernel)
    assert out.dtype == jnp.bfloat16
    exact = convolution._direct(x.astype(jnp.float32), kernel.astype(jnp.float32), 1)
    np.testing.assert_allclose(out.astype(jnp.float32), exact, rtol=2**-8, atol=1e-3)  # half a unit in the last place


@pytest.mark.parametrize(("convolve", "inputs"), [(conv2d, 8), (conv3x3, 8), (depthwise_conv2d, 1)])
@pytest.mark.parametrize("shape", [(8, 70, 64, 8), (256, 14, 14, 8)])
def test_devices_that_share_the_maps_exchange_only_a_sum_outside_of_loops(shape, convolve, inputs):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    x, kernel = draw(shape, (3, 3, inputs, 8), np.float32)
    x = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))

    def gradients(x, kernel):
        return jax.grad(lambda x, kernel: jnp.sum(jnp.square(convolve(x, kernel))), (0, 1))(x, kernel)

    program = jax.jit(gradients).lower(x, jax.device_put(kernel, NamedSharding(mesh, PartitionSpec()))).compile()
    text = program.as_text()
    assert "all-gather" not in text
    assert "all-reduce" in text, "the gradient of the kernel is a sum over the devices"
    assert collectives_in_loops(text) == [], "devices with too few threads could wait for ever"


def test_a_wrong_transform_shows(monkeypatch):
    monkeypatch.setattr(winograd, "_INPUT", winograd._INPUT[::-1])
    with jax.enable_x64(True), pytest.raises(AssertionError):
        assert_same(conv3x3, direct, *draw((2, 8, 8, 3), (3, 3, 3, 6)), 1e-13)


def direct_depthwise(x, kernel, stride):
    padding = (kernel.shape[0] - 1) // 2
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        ((padding, padding),) * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


@pytest.mark.parametrize(("size", "stride"), [(3, 1), (3, 2), (5, 1), (5, 2)])
@pytest.mark.parametrize("shape", [(2, 11, 14, 3), (3, 6, 5, 4), (1, 1, 2, 2)])
def test_a_depthwise_convolution_filters_each_channel_by_itself(size, stride, shape):
    ours, reference = (functools.partial(f, stride=stride) for f in (depthwise_conv2d, direct_depthwise))
    with jax.enable_x64(True):
        assert_same(ours, reference, *draw(shape, (size, size, 1, shape[-1])), 1e-13)
        # What accelerators run.
        direct_form = functools.partial(convolution._depthwise_direct, stride=stride)
        assert_same(direct_form, reference, *draw(shape, (size, size, 1, shape[-1])), 1e-13)


def test_a_depthwise_convolution_in_half_precision_rounds_only_its_result():
    x, kernel = draw((1, 9, 9, 4), (5, 5, 1, 4), jnp.bfloat16)
    out = depthwise_conv2d(x, kernel)
    assert out.dtype == jnp.bfloat16
    exact = direct_depthwise(x.astype(jnp.float32), kernel.astype(jnp.float32), 1)
    np.testing.assert_allclose(out.astype(jnp.float32), exact, rtol=2**-8)  # half a unit in the last place
