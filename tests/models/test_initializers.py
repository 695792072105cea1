import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskrcnn_jax.models.initializers import kaiming_normal, kaiming_uniform, normal

SHAPE = (3, 3, 50, 80)
INITIALIZERS = {
    "normal": (normal(0.01), 0.01),
    "kaiming_normal": (kaiming_normal, (2 / (9 * 80)) ** 0.5),
    "kaiming_uniform": (kaiming_uniform(2.0), (2 / (9 * 50)) ** 0.5),
}


@pytest.mark.parametrize("name", INITIALIZERS)
def test_values_have_the_standard_deviation_of_their_formula(name, key):
    initializer, std = INITIALIZERS[name]
    values = np.asarray(initializer(key, SHAPE, jnp.float32))
    assert values.shape == SHAPE
    assert values.dtype == np.float32
    assert values.std() == pytest.approx(std, rel=0.02)
    assert abs(values.mean()) < 0.02 * std
    # A normal distribution has tails; a uniform one ends at the square root of three.
    assert (np.abs(values).max() <= 3**0.5 * std) == (name == "kaiming_uniform")


def test_a_key_decides_the_values_traced_or_not(key):
    initializer = normal(1.0)
    first, other = initializer(key, (4, 5)), initializer(jax.random.key(1), (4, 5))
    traced = jax.jit(lambda key: initializer(key, (4, 5)))(key)
    np.testing.assert_array_equal(first, traced)
    assert not np.any(first == other)


def test_double_precision_has_all_of_its_digits():
    with jax.enable_x64(True):
        values = kaiming_uniform(1.0)(jax.random.key(0), (10, 10), jnp.float64)
        assert values.dtype == jnp.float64
        assert np.any(np.asarray(values) != np.asarray(values).astype(np.float32))
