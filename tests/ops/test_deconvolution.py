"""The mask head enlarges a few RoIs at a time, with a gradient of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskrcnn_jax.ops.deconvolution import enlarged_logits


def at_once(x, filters, kernel, bias):
    enlarged = jax.nn.relu(jnp.einsum("brhwl,lijk->brhwijk", x, kernel) + bias.reshape(1, 1, 1, 1, 1, 1, -1))
    logits = jnp.einsum("brhwijk,brk->brhiwj", enlarged, filters)
    return logits.reshape(*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3])


@pytest.mark.parametrize("num_rois", [1, 7, 12, 24])
def test_enlarging_in_chunks_gives_the_values_and_gradients_of_all_at_once(num_rois):
    rng = np.random.default_rng(0)
    shapes = (2, num_rois, 3, 4, 5), (2, num_rois, 5), (5, 2, 2, 5), (5,)
    upstream = rng.normal(size=(2, num_rois, 6, 8))
    with jax.enable_x64(True):
        arrays = [jnp.asarray(rng.normal(size=shape)) for shape in shapes]
        results = []
        for form in (at_once, enlarged_logits):
            logits, pull = jax.vjp(jax.jit(form), *arrays)
            results.append([logits, *pull(jnp.asarray(upstream))])
        for wanted, ours in zip(*results, strict=True):
            np.testing.assert_allclose(ours, wanted, rtol=1e-11, atol=1e-11)
