"""The arrays between the stages have the shapes and dtypes that structures.py annotates."""

from typing import NamedTuple, get_type_hints

import jax
import numpy as np
from flax import nnx
from jaxtyping import jaxtyped

from tests.models.tiny import tiny_batch


def wrong_fields(value: NamedTuple) -> list[str]:
    """Return the fields that differ from their annotations; equal letters are equal sizes."""
    hints = get_type_hints(type(value))
    with jaxtyped("context"):
        return [name for name, hint in hints.items() if not isinstance(getattr(value, name), hint)]


def test_batches_and_the_results_of_stages_are_as_annotated(tiny, key):
    batch = tiny_batch()
    graph, state = nnx.split(tiny)

    def stages(state, batch, key):
        model = nnx.merge(graph, state)
        features = model.features(batch.images, batch.sizes)
        anchors = model.anchors(features, batch.images.shape[1:3])
        proposals = model.propose(*model.rpn(features), anchors, batch.sizes, train=True)
        return proposals, model.sample_rois(key, proposals, batch.gt), model.detect(batch.images, batch.sizes)

    for value in (batch, batch.gt, *jax.eval_shape(stages, state, batch, key)):
        assert wrong_fields(value) == []


def test_a_wrong_size_or_dtype_is_found():
    batch = tiny_batch()
    assert wrong_fields(batch._replace(sizes=batch.sizes[:1])) == ["sizes"]
    assert wrong_fields(batch.gt._replace(labels=batch.gt.labels.astype(np.int64))) == ["labels"]
    assert wrong_fields(batch.gt._replace(masks=batch.gt.masks[..., 1:])) == ["masks"]
