"""Detections are kept by class and by the minimum score of their class."""

import numpy as np
import pytest

from maskrcnn_jax.data.categories import Categories
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.inference.results import Instances
from maskrcnn_jax.inference.selection import keep, minimum_scores

CATEGORIES = Categories.create([7, 9, 20], ["cup", "dog", "person"])
INFINITE = np.inf


@pytest.mark.parametrize(
    ("choices", "expected"),
    [
        ({}, [0.5, 0.5, 0.5]),
        ({"min_score": 0.25}, [0.25, 0.25, 0.25]),
        ({"min_score": {"person": 0.75}}, [0.5, 0.5, 0.75]),
        ({"min_score": {"person": 0.75, None: 0.25}}, [0.25, 0.25, 0.75]),
        ({"classes": "dog"}, [INFINITE, 0.5, INFINITE]),
        ({"classes": (name for name in ["dog"])}, [INFINITE, 0.5, INFINITE]),
        ({"classes": ["dog"]}, [INFINITE, 0.5, INFINITE]),
        ({"classes": ("dog", "cup"), "min_score": {"dog": 0.0}}, [0.5, 0.0, INFINITE]),
    ],
)
def test_each_label_has_its_least_score(choices, expected):
    assert minimum_scores(CATEGORIES, **choices).tolist() == [INFINITE, *expected]


def test_labels_that_stand_for_no_category_are_never_kept():
    least = minimum_scores(Categories.coco(), 0.0)
    assert np.isfinite(least).sum() == 80 and least[12] == INFINITE


def test_detections_at_the_least_score_are_kept():
    found = Instances(
        np.arange(16, dtype=np.float32).reshape(4, 4),
        np.float32([0.9, 0.5, 0.49, 0.3]),
        np.int32([1, 2, 2, 3]),
        np.zeros((4, 28, 28), np.float32),
    )
    kept = keep(found, minimum_scores(CATEGORIES, {"cup": 0.95, "person": 0.3}))
    assert kept.labels.tolist() == [2, 3]
    np.testing.assert_array_equal(kept.boxes, found.boxes[[1, 3]])
    assert kept.masks.shape == (2, 28, 28)


@pytest.mark.parametrize("choices", [{"classes": ["persn"]}, {"min_score": {"persn": 0.5}}])
def test_a_class_that_the_model_has_not_is_named(choices):
    with pytest.raises(UserError, match="no class 'persn'.*person"):
        minimum_scores(CATEGORIES, **choices)


def test_what_is_no_class_or_no_score_is_refused():
    with pytest.raises(UserError, match="no class 1; it has, among others, cup"):
        minimum_scores(CATEGORIES, classes=[1])
    for score in (float("nan"), "high", None):
        with pytest.raises(UserError, match="the minimum score is .*; use a number from 0 to 1"):
            minimum_scores(CATEGORIES, {"cup": score})
