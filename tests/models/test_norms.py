"""Batch normalisation: only valid rows count, as torch's, exact where the mean is large. Group normalisation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from maskrcnn_jax.distributed import make_mesh, on_each_device
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.models.layers import NUM_GROUPS, BatchNorm, BatchStatistics, GroupNorm, make_norm
from maskrcnn_jax.ops.devices import sum_over_devices
from maskrcnn_jax.ops.normalization import batch_norm, group_norm
from maskrcnn_jax.weights import torchvision
from tests.models.tiny import tiny_model


def rows(count: int, seed: int = 0, mean: float = 2.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 3, 4, 5)) * 1.5 + mean


def trained(norm: BatchNorm, x, valid=None):
    norm.train()
    return np.asarray(norm(jnp.asarray(x), valid)), np.asarray(norm.mean[...]), np.asarray(norm.var[...])


def test_invalid_rows_change_neither_the_output_of_the_others_nor_the_statistics():
    x, other = rows(6), rows(3, seed=1, mean=50.0)
    with jax.enable_x64(True):
        output, mean, var = trained(BatchNorm(5, dtype=jnp.float64), x)
        mixed = np.concatenate([x[:2], other, x[2:]])
        valid = jnp.array([True] * 2 + [False] * 3 + [True] * 4)
        padded, padded_mean, padded_var = trained(BatchNorm(5, dtype=jnp.float64), mixed, valid)
    np.testing.assert_allclose(padded[np.asarray(valid)], output, atol=1e-12)
    np.testing.assert_allclose(padded_mean, mean, atol=1e-12)
    np.testing.assert_allclose(padded_var, var, atol=1e-12)


def test_without_a_valid_row_nothing_is_learnt_and_all_is_finite():
    norm = BatchNorm(5, dtype=jnp.float32)
    output, mean, var = trained(norm, rows(4).astype(np.float32), jnp.zeros(4, bool))
    assert np.isfinite(output).all()
    np.testing.assert_array_equal(mean, np.zeros(5))
    np.testing.assert_array_equal(var, np.ones(5))
    assert int(norm.num_batches[...]) == 0


def test_a_training_step_equals_torchs_batch_norm():
    torch = pytest.importorskip("torch")
    x = rows(6)
    reference = torch.nn.BatchNorm2d(5).double()
    with torch.no_grad():
        reference.weight.copy_(torch.linspace(0.5, 2, 5))
        reference.bias.copy_(torch.linspace(-1, 1, 5))
    wanted = [reference(torch.tensor(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).detach().numpy() for _ in range(2)]
    with jax.enable_x64(True):
        norm = BatchNorm(5, dtype=jnp.float64)
        norm.scale[...] = jnp.linspace(0.5, 2, 5)
        norm.bias[...] = jnp.linspace(-1, 1, 5)
        # The second step has other running statistics, on which the output must not depend.
        outputs = [trained(norm, x)[0] for _ in range(2)]
        mean, var, count = (np.asarray(v[...]) for v in (norm.mean, norm.var, norm.num_batches))
    np.testing.assert_allclose(outputs, wanted, atol=1e-12)
    np.testing.assert_allclose(mean, reference.running_mean, atol=1e-12)
    np.testing.assert_allclose(var, reference.running_var, atol=1e-12)
    assert int(count) == int(reference.num_batches_tracked)


def test_a_large_mean_costs_no_digits_once_it_is_known():
    """Squares of numbers near 3000 share all the digits that float32 has."""
    x = rows(64, mean=3000.0)
    norm = BatchNorm(5, dtype=jnp.float32)
    norm.mean[...] = jnp.full(5, 3000.5)
    output, _, _ = trained(norm, x.astype(np.float32))
    wanted = (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-5)
    # The rounding of x itself: half a unit in the last place of 3000.
    np.testing.assert_allclose(output, wanted, atol=1e-3)


@pytest.mark.parametrize("num_devices", [1, 4])
def test_gradients_equal_those_of_the_formula(num_devices):
    """By automatic differentiation of the mean and the variance, with and without invalid rows and other devices."""
    x, valid = rows(8), np.array([True, True, False, True, True, True, False, True])
    scale, bias, shift = np.linspace(0.5, 2, 5), np.linspace(-1, 1, 5), np.full(5, 0.3)
    direction = np.random.default_rng(2).normal(size=x.shape)

    def formula(x, scale, bias):
        weight = (valid / (valid.sum() * 12)).reshape(-1, 1, 1, 1)
        mean = jnp.sum(weight * x, axis=(0, 1, 2))
        var = jnp.sum(weight * jnp.square(x - mean.reshape(1, 1, 1, -1)), axis=(0, 1, 2))
        y = (x - mean.reshape(1, 1, 1, -1)) / jnp.sqrt(var + 1e-5).reshape(1, 1, 1, -1)
        return jnp.sum(direction * (y * scale.reshape(1, 1, 1, -1) + bias.reshape(1, 1, 1, -1)))

    def share(shared, batch):
        def loss(x, scale, bias):
            return jnp.sum(batch[2] * batch_norm(x, scale, bias, batch[1], jnp.asarray(shift), 1e-5, jnp.float64)[0])

        by_x, *by_parameters = jax.grad(loss, (0, 1, 2))(batch[0], *shared)
        return by_x, jax.tree.map(lambda total: total[None], sum_over_devices(by_parameters))

    with jax.enable_x64(True):
        mesh = make_mesh(jax.devices()[:num_devices])
        ours = jax.jit(on_each_device(share, mesh, returns_rows=True))((scale, bias), (x, valid, direction))
        wanted = jax.grad(formula, (0, 1, 2))(*map(jnp.asarray, (x, scale, bias)))
    np.testing.assert_allclose(ours[0], wanted[0], atol=1e-12)
    for total, expected in zip(ours[1], wanted[1:], strict=True):
        np.testing.assert_allclose(total[0], expected, atol=1e-12)


def test_of_half_precision_nothing_wider_is_kept_for_the_gradient():
    x = jnp.asarray(rows(2), jnp.bfloat16)
    arguments = jnp.ones(5), jnp.zeros(5), jnp.ones(2, bool), jnp.zeros(5)
    _, pull = jax.vjp(lambda x: batch_norm(x, *arguments, 1e-5, jnp.bfloat16)[0], x)
    kept = [leaf for leaf in jax.tree.leaves(pull) if leaf.size >= x.size]
    assert kept and all(leaf.dtype == jnp.bfloat16 for leaf in kept)


def group_norm_pair(channels, dtype):
    """Return our group norm and torch's in float64, with the same scales and offsets."""
    torch = pytest.importorskip("torch")
    reference, norm = torch.nn.GroupNorm(NUM_GROUPS, channels).double(), GroupNorm(channels, dtype=dtype)
    scale, bias = np.linspace(0.5, 2, channels), np.linspace(-1, 1, channels)
    with torch.no_grad():
        reference.weight.copy_(torch.tensor(scale))
        reference.bias.copy_(torch.tensor(bias))
    norm.scale[...], norm.bias[...] = (jnp.asarray(array, norm.scale.dtype) for array in (scale, bias))
    return norm, reference


@pytest.mark.parametrize("channels", [32, 64, 96])
def test_values_and_gradients_of_group_norm_are_torchs(channels):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    x, direction = rng.normal(size=(2, 3, 5, 4, channels)) * 1.5 + np.array([2.0, 0]).reshape(2, 1, 1, 1, 1)
    inputs = torch.tensor(x, requires_grad=True)
    with jax.enable_x64(True):
        norm, reference = group_norm_pair(channels, jnp.float64)
        wanted = reference(inputs.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        (wanted * torch.tensor(direction)).sum().backward()

        @jax.jit
        def run(x, scale, bias):
            options = {"num_groups": NUM_GROUPS, "eps": norm.eps, "dtype": norm.dtype}
            y, pull = jax.vjp(lambda *arrays: group_norm(*arrays, **options), x, scale, bias)
            return y, *pull(jnp.asarray(direction))

        y, *gradients = run(jnp.asarray(x), norm.scale[...], norm.bias[...])
        np.testing.assert_allclose(norm(jnp.asarray(x)), y, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(y, wanted.detach(), rtol=0, atol=1e-11)
    for ours, theirs in zip(gradients, (inputs, reference.weight, reference.bias), strict=True):
        np.testing.assert_allclose(ours, theirs.grad, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_group_norm_has_statistics_in_float32_where_the_network_computes_in_half_precision(dtype):
    """Squares of 300 overflow in float16, and bfloat16 cannot tell 300 from 301."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 8, 8, 32)) * 300, dtype)
    norm, reference = group_norm_pair(32, jnp.dtype(dtype))
    torch = pytest.importorskip("torch")
    wanted = reference(torch.tensor(np.asarray(x, np.float64)).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).detach()
    y = norm(x)
    assert y.dtype == jnp.dtype(dtype)
    np.testing.assert_allclose(np.asarray(y, np.float64), wanted, rtol=float(jnp.finfo(dtype).eps), atol=1e-5)


def test_rows_of_a_group_norm_do_not_depend_on_each_other_but_on_the_padding_of_their_own_image():
    norm = GroupNorm(32, dtype=jnp.float32)
    x = np.random.default_rng(0).normal(size=(3, 4, 5, 32)).astype(np.float32)
    alone, together = norm(jnp.asarray(x[:1])), norm(jnp.asarray(x))
    np.testing.assert_allclose(together[:1], alone, atol=1e-6)
    padded = norm(jnp.pad(x[:1], ((0, 0), (0, 4), (0, 0), (0, 0))))[:, :4]
    assert float(jnp.abs(padded - alone).max()) > 0.1, "as in detectron2, cells of the padding count"


def test_channels_that_cannot_be_grouped_are_refused():
    with pytest.raises(UserError, match="32 groups, which 48 channels do not allow; use multiples of 32"):
        GroupNorm(48, dtype=jnp.float32)
    with pytest.raises(UserError, match="use 'batch', 'frozen', 'group' or 'none'"):
        make_norm("layer", 32, eps=1e-5, momentum=0.1, gain=1.0, dtype=jnp.float32)


def test_group_norms_are_in_the_backbone_the_pyramid_and_the_heads_and_have_torchvisions_names():
    wide = {"stem_channels": 32, "stage_channels": 32, "fpn_channels": 32, "mask_channels": 32}
    model = tiny_model(norm="group", head_norm="group", box_conv_channels=(32,), **wide)
    norms = {path[0] for path, module in nnx.iter_modules(model) if isinstance(module, GroupNorm)}
    assert norms == {"backbone", "fpn", "box_head", "mask_head"}
    keys = {entry.key for entry in torchvision.entries(model)}
    assert {"backbone.body.bn1.weight", "backbone.fpn.inner_blocks.0.1.bias", "roi_heads.mask_head.0.1.weight"} <= keys
    assert not any("running" in key for key in keys)


@pytest.mark.parametrize("num_devices", [2, 4])
def test_with_statistics_of_each_device_the_result_is_that_of_independent_parts(num_devices):
    """Outputs, gradients and statistics; on the last device no row is valid."""
    x, direction = rows(8), np.random.default_rng(2).normal(size=(8, 3, 4, 5))
    valid = np.arange(8) < 8 - 8 // num_devices
    valid[1] = False
    mesh = make_mesh(jax.devices()[:num_devices])

    def step(norm, x, valid, direction):
        graph, params, rest = nnx.split(norm, nnx.Param, ...)

        def loss(params, x):
            norm = nnx.merge(graph, params, rest, copy=True)
            y = norm(x, valid)
            return jnp.sum(y * direction), (y, nnx.state(norm, BatchStatistics))

        (by_params, by_x), (y, statistics) = jax.grad(loss, (0, 1), has_aux=True)(params, x)
        return (y, by_x), sum_over_devices(by_params), statistics

    def of_rows(_, rows):
        outputs, gradients, statistics = step(norm, *rows)
        # Of each device, to see that all have the same.
        return outputs, jax.tree.map(lambda array: array[None], (gradients, statistics))

    with jax.enable_x64(True):
        norm = BatchNorm(5, dtype=jnp.float64)
        norm.sync = False
        norm.scale[...] = jnp.linspace(0.5, 2, 5)
        arrays = [jnp.asarray(array) for array in (x, valid, direction)]
        outputs, kept = jax.jit(on_each_device(of_rows, mesh, returns_rows=True))((), arrays)
        parts = [step(norm, *part) for part in zip(*(jnp.split(array, num_devices) for array in arrays), strict=True)]
        for ours, theirs in zip(outputs, zip(*(part[0] for part in parts), strict=True), strict=True):
            np.testing.assert_allclose(ours, np.concatenate(theirs), atol=1e-12)
        gradients, statistics = kept
        for ours, *theirs in zip(*map(jax.tree.leaves, (gradients, *(part[1] for part in parts))), strict=True):
            np.testing.assert_allclose(ours[0], sum(map(np.asarray, theirs)), atol=1e-12)
        for name in ("mean", "var"):
            ours, theirs = np.asarray(statistics[name][...]), [part[2][name][...] for part in parts[:-1]]
            np.testing.assert_allclose(ours[0], np.mean(theirs, axis=0), atol=1e-12)
            assert (ours == ours[0]).all(), "devices keep the same"
        assert (np.asarray(statistics["num_batches"][...]) == 1).all()


def test_the_option_reaches_every_batch_norm():
    for sync in (True, False):
        model = tiny_model(norm="batch", head_norm="batch", box_conv_channels=(16,), sync_batch_norm=sync)
        norms = [module for _, module in nnx.iter_modules(model) if isinstance(module, BatchNorm)]
        assert len(norms) > 20 and all(norm.sync is sync for norm in norms)
    tiny_model(norm="frozen", sync_batch_norm=False)
