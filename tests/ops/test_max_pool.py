"""Max pooling in both forms, beside torch's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from maskrcnn_jax.ops.cpu.max_pool import max_of_slices
from maskrcnn_jax.ops.max_pool import max_of_windows, max_pool


@pytest.mark.parametrize("pool", [max_pool, max_of_slices, max_of_windows])
@pytest.mark.parametrize("shape", [(2, 7, 8, 3), (1, 1, 2, 1)])
def test_maxima_and_their_gradient_are_torchs(pool, shape):
    rng = np.random.default_rng(0)
    x = rng.permutation(np.prod(shape)).reshape(shape).astype(np.float32) - 20  # no two are equal
    reference = torch.tensor(x, requires_grad=True)
    pooled = torch.nn.functional.max_pool2d(reference.permute(0, 3, 1, 2), 3, 2, 1).permute(0, 2, 3, 1)
    ours, pull = jax.vjp(pool, jnp.asarray(x))
    np.testing.assert_array_equal(ours, pooled.detach())
    gradient = rng.normal(size=pooled.shape).astype(np.float32)
    pooled.backward(torch.tensor(gradient))
    np.testing.assert_allclose(pull(jnp.asarray(gradient))[0], reference.grad, atol=1e-6)


def test_of_equal_maxima_windows_choose_the_first_and_slices_share():
    gradient = jnp.ones((1, 1, 1, 1))
    by_windows, by_slices = (
        jax.vjp(pool, jnp.zeros((1, 2, 2, 1)))[1](gradient)[0].ravel() for pool in (max_of_windows, max_of_slices)
    )
    np.testing.assert_array_equal(by_windows, [1, 0, 0, 0])
    np.testing.assert_allclose(by_slices.sum(), 1)
    assert (by_slices > 0).all()
