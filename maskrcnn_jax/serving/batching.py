"""Batches of the images that wait: one thread computes, and takes as many images of one padded size as there are.

No image waits for others to come. While a batch is computed, new images gather, so batches grow with the load.
"""

import collections
import itertools
import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Protocol

import numpy as np

from maskrcnn_jax.data.categories import Categories
from maskrcnn_jax.inference.detections import ImageDetections
from maskrcnn_jax.inference.predictor import Prepared
from maskrcnn_jax.options import Options
from maskrcnn_jax.serving.metrics import Metrics

_log = logging.getLogger(__name__)


class Model(Protocol):
    """What the service uses of a ``Predictor``; any other object with these members can be served, too."""

    categories: Categories
    options: Options

    @property
    def padded_sizes(self) -> list[tuple[int, int]]:
        """The (height, width) that prepared images may have."""

    def prepare(self, image: np.ndarray) -> Prepared:
        """Resize and pad an image; called by several threads."""

    def predict_prepared(self, images: Sequence[Prepared], *, min_score: float) -> list[ImageDetections]:
        """Find the objects in images of one padded size; called by one thread."""


class Batcher:
    """Computes predictions in a thread of its own, several images at a time.

    Batches have 1, 2, 4, ... images. Of five waiting images, four are computed and the fifth is left for the next
    batch, so no time goes into padding and few programs are compiled.
    """

    def __init__(self, model: Model, *, max_batch: int, metrics: Metrics):
        """Start the thread.

        Args:
            model: The predictor.
            max_batch: Images of the largest batch, a power of two.
            metrics: Where batches are counted.
        """
        self._model, self._max_batch, self._metrics = model, max_batch, metrics
        self._waiting: collections.deque[tuple[Prepared, Future[ImageDetections]]] = collections.deque()
        self._changed, self._closed = threading.Condition(), False
        self._thread = threading.Thread(target=self._run, name="batches", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        """Return how many images wait."""
        return len(self._waiting)

    def submit(self, prepared: Prepared) -> "Future[ImageDetections]":
        """Let an image wait for its prediction.

        Returns:
            All that the model finds, without a limit of the score. Cancelling it takes the image out of the queue,
            unless it is being computed.
        """
        future: Future[ImageDetections] = Future()
        with self._changed:
            if self._closed:
                raise RuntimeError("the service is stopping")
            self._waiting.append((prepared, future))
            self._changed.notify()
        future.add_done_callback(self._forget)
        return future

    def _forget(self, future: "Future[ImageDetections]") -> None:
        """Take an image out of the queue as soon as nobody waits for it: its memory is for the next."""
        if future.cancelled():
            with self._changed:
                self._waiting = collections.deque(item for item in self._waiting if item[1] is not future)

    def close(self) -> None:
        """Compute what waits, and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while self._compute(self._next()):
            pass

    def _compute(self, batch: "list[tuple[Prepared, Future[ImageDetections]]]") -> bool:
        """Compute a batch, of which nothing is kept while the thread waits; returns whether there was one."""
        if not batch:
            return False
        start = time.monotonic()
        # Whoever asked may have left. Without these images the batch would have a size that is not compiled.
        wanted = [future.set_running_or_notify_cancel() for _, future in batch]
        if not any(wanted):
            return True
        futures = [future for _, future in batch]
        try:
            found = self._model.predict_prepared([prepared for prepared, _ in batch], min_score=0.0)
        except Exception as error:  # such as too little memory for so many images; the service goes on
            _log.exception("a batch of %d images failed", len(batch))
            for future in itertools.compress(futures, wanted):
                future.set_exception(error)
        else:
            for future, detections in itertools.compress(zip(futures, found, strict=True), wanted):
                future.set_result(detections)
        self._metrics.batch_sizes.observe(len(batch))
        self._metrics.batch_seconds.observe(time.monotonic() - start)
        return True

    def _next(self) -> "list[tuple[Prepared, Future[ImageDetections]]]":
        """Return the images of the next batch; none when the queue is closed and empty."""
        with self._changed:
            while not (self._waiting or self._closed):
                self._changed.wait()
            size = self._waiting[0][0].padded_size if self._waiting else None
            alike = [item for item in self._waiting if item[0].padded_size == size][: self._max_batch]
            batch = alike[: 1 << max(len(alike).bit_length() - 1, 0)]
            chosen = {id(item) for item in batch}
            self._waiting = collections.deque(item for item in self._waiting if id(item) not in chosen)
            return batch
