"""Which of the detections are wanted: by class, and by a minimum score, which may differ by class. Without JAX."""

import difflib
import math
from collections.abc import Collection, Iterable, Mapping
from typing import SupportsFloat, TypeAlias

import numpy as np

from maskrcnn_jax.data.categories import Categories
from maskrcnn_jax.errors import UserError
from maskrcnn_jax.inference.results import Instances

MIN_SCORE = 0.5  # detections below are left out unless others are asked for
# For all classes, or by name; the key None stands for the classes that are not named, otherwise MIN_SCORE does.
MinScore: TypeAlias = float | Mapping[str | None, float]


def minimum_scores(
    categories: Categories, min_score: MinScore = MIN_SCORE, classes: Collection[str] | None = None
) -> np.ndarray:
    """Return the minimum score at which a detection of each label is wanted.

    Args:
        categories: of the model.
        min_score: for all classes, or by name.
        classes: names of the classes that are wanted, or one name; None means all.

    Returns:
        [num_classes] float32, by label; infinite for unwanted classes and for labels that stand for no category, which
        torchvision's 91 classes contain.

    Raises:
        UserError: if there is no such class, or a score is no number.
    """
    scores: Mapping[str | None, float] = min_score if isinstance(min_score, Mapping) else {None: min_score}
    for score in scores.values():
        # Not a number would leave out everything.
        if not isinstance(score, SupportsFloat) or math.isnan(score):
            raise UserError(f"the minimum score is {score!r}; use a number from 0 to 1, such as 0.5")
    wanted = categories.names if classes is None else [classes] if isinstance(classes, str) else [*classes]
    _check_names(categories, [*(name for name in scores if name is not None), *wanted])
    least = np.full(categories.num_classes, np.inf, np.float32)
    for label, name in zip(categories.labels, categories.names, strict=True):
        if name in wanted:
            least[label] = scores.get(name, scores.get(None, MIN_SCORE))
    return least


def keep(found: Instances, least: np.ndarray) -> Instances:
    """Return the detections whose scores are not below those of ``minimum_scores``."""
    chosen = found.scores >= least[found.labels]
    return Instances(*(values[chosen] for values in found))


def _check_names(categories: Categories, names: Iterable[str]) -> None:
    for name in names:
        if name not in categories.names:
            close = difflib.get_close_matches(str(name), categories.names) or categories.names[:5]
            raise UserError(f"the model has no class {name!r}; it has, among others, {', '.join(close)}")
