"""Rows whose value came before."""

import numpy as np
import pytest

from maskrcnn_jax.data.annotations import repetitions


@pytest.mark.parametrize(
    ("values", "rows"),
    [([], []), ([5], []), ([3, 1, 2], []), ([7, 3, 7, 3, 7], [2, 3, 4]), (["b", "a", "b", "é"], [2])],
)
def test_the_first_of_each_value_is_no_repetition(values, rows):
    assert repetitions(np.array(values)).tolist() == rows
