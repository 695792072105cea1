"""Images that wait are computed together, and what is found in them is what is found in each alone."""

import threading
import weakref
from concurrent.futures import Future

import numpy as np
import pytest

from maskrcnn_jax.data.categories import Categories
from maskrcnn_jax.inference.predictor import Predictor
from maskrcnn_jax.options import DataOptions, Options
from maskrcnn_jax.serving.batching import Batcher
from maskrcnn_jax.serving.metrics import Metrics
from maskrcnn_jax.serving.warm_up import warm_up, with_few_sizes
from tests.children import wait_until
from tests.models.tiny import tiny_model
from tests.serving.service import ColourPredictor, draw_regions

IMAGE = draw_regions()


class Gate(ColourPredictor):
    """Computes only after the test sets ``open``, and tells the padded size of each batch."""

    def __init__(self):
        super().__init__()
        self.open.clear()
        self.sizes = []
        self._buckets = [(64, 64), (64, 128), (128, 64)]
        self.options = Options(data=DataOptions(short_side=64, long_side=128))

    def _detect(self, images, sizes):
        self.sizes.append(images.shape[:3])
        return super()._detect(images, sizes)


@pytest.fixture
def gate():
    return Gate()


@pytest.fixture
def batcher(gate):
    batcher = Batcher(gate, max_batch=4, metrics=Metrics(4))
    yield batcher
    gate.open.set()
    batcher.close()


def submit(batcher, model, images) -> list[Future]:
    """Let images wait, after the first is being computed."""
    futures = [batcher.submit(model.prepare(images[0]))]
    wait_until(futures[0].running)
    return futures + [batcher.submit(model.prepare(image)) for image in images[1:]]


def test_what_waits_is_computed_together_in_powers_of_two(batcher, gate):
    futures = submit(batcher, gate, [IMAGE] * 8)
    assert len(batcher) == 7
    gate.open.set()
    assert all(len(future.result()) == 3 for future in futures)
    assert gate.batches == [1, 4, 2, 1]


def test_only_images_of_one_padded_size_share_a_batch_and_none_waits_for_ever(batcher, gate):
    wide = np.tile(IMAGE, (1, 2, 1))
    futures = submit(batcher, gate, [IMAGE, wide, IMAGE, wide, IMAGE])
    gate.open.set()
    assert [len(future.result()) for future in futures] == [3, 6, 3, 6, 3]
    assert gate.sizes == [(1, 64, 64), (2, 64, 128), (2, 64, 64)]


def test_cancelled_images_are_not_computed(batcher, gate):
    futures = submit(batcher, gate, [IMAGE] * 4)
    assert futures[2].cancel()
    assert len(batcher) == 2, "its memory is for the next image at once, not after the batch that is computed"
    gate.open.set()
    futures[3].result()
    assert gate.batches == [1, 2]


def test_an_error_reaches_every_image_of_its_batch_and_no_other(batcher, gate):
    futures = submit(batcher, gate, [IMAGE] * 3)
    gate.error = ValueError("broken")
    gate.open.set()
    with pytest.raises(ValueError, match="broken"):
        futures[0].result()
    assert [len(future.result()) for future in futures[1:]] == [3, 3]


def test_nothing_of_a_batch_is_kept_after_it(batcher, gate):
    gate.open.set()
    prepared = gate.prepare(IMAGE.copy())
    kept = weakref.ref(prepared.image)
    batcher.submit(prepared).result()
    del prepared
    wait_until(lambda: kept() is None)  # the thread waits for the next


def test_closing_computes_what_waits(gate):
    batcher = Batcher(gate, max_batch=4, metrics=Metrics(4))
    futures = submit(batcher, gate, [IMAGE] * 3)
    threading.Timer(0.05, gate.open.set).start()
    batcher.close()
    assert all(future.done() for future in futures)
    with pytest.raises(RuntimeError, match="stopping"):
        batcher.submit(gate.prepare(IMAGE))


def tiny_predictor(**data) -> Predictor:
    options = Options(model=tiny_model().options, data=DataOptions(short_side=64, long_side=96, **data))
    return Predictor(tiny_model(), Categories.create([1, 2, 3, 4], list("abcd")), options)


@pytest.mark.slow
def test_a_batch_finds_in_each_image_what_it_finds_alone():
    model = tiny_predictor()
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((64, 64), (90, 100))]
    alone = [model.predict(image, min_score=0) for image in images]
    together = model.predict_prepared([model.prepare(image) for image in images], min_score=0)
    assert all(len(found) for found in alone)
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one.labels, other.labels)
        np.testing.assert_allclose(one.boxes, other.boxes, atol=1e-3)
        np.testing.assert_allclose(one.scores, other.scores, atol=1e-5)
        np.testing.assert_array_equal(one.image, other.image)


def test_every_program_is_compiled_before_the_first_request():
    model = Gate()
    model.open.set()
    warm_up(model, 4)
    assert model.sizes == [(count, *size) for size in model.padded_sizes for count in (1, 2, 4)]


def test_a_model_of_any_size_is_served_with_a_few():
    model = tiny_predictor(buckets="exact")
    assert model.padded_sizes == []
    served = with_few_sizes(model)
    assert served.padded_sizes and served.prepare(np.zeros((50, 70, 3), np.uint8)).padded_size in served.padded_sizes
    assert with_few_sizes(served) is served
