"""Batch normalisation: only valid rows count, as torch's, and exact where the mean is large."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskrcnn_jax.distributed import make_mesh, on_each_device
from maskrcnn_jax.models.layers import BatchNorm
from maskrcnn_jax.ops.devices import sum_over_devices
from maskrcnn_jax.ops.normalization import batch_norm


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
