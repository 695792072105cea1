"""A service in a thread of the test, whose model finds red, green and blue regions by their colour."""

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Iterator

import cv2
import numpy as np

from maskrcnn_jax.data.categories import Categories
from maskrcnn_jax.inference.predictor import Predictor
from maskrcnn_jax.options import DataOptions, ModelOptions, Options
from maskrcnn_jax.serving.app import Service, create_app
from maskrcnn_jax.serving.limits import Limits
from maskrcnn_jax.serving.server import bind, make_server
from maskrcnn_jax.structures import Detections
from tests.children import PATIENCE

NAMES = ["red", "green", "blue & <bold>"]
_MOST = 10


class ColourPredictor(Predictor):
    """A predictor whose network is replaced; images are resized and results are scaled by the real one.

    Attributes:
        batches: the number of images of each call.
        open: calls wait until it is set, as it is at first.
        seconds: how long a call takes.
        error: raised by the next call, if there is one.
    """

    def __init__(self, *, side: int = 64, channels: int = 3):
        data = DataOptions(short_side=side, long_side=side)
        options = Options(model=ModelOptions(in_channels=channels), data=data)
        super().__init__(None, Categories.create([10, 20, 30], NAMES), options, detect=self._detect)
        self._buckets = [(side, side)]
        self.batches, self.seconds, self.error = [], 0.0, None
        self.open = threading.Event()
        self.open.set()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Let calls wait until the block ends."""
        self.open.clear()
        try:
            yield
        finally:
            self.open.set()

    def _detect(self, images, sizes):
        self.batches.append(len(images))
        self.open.wait()
        time.sleep(self.seconds)
        if self.error:
            error, self.error = self.error, None
            raise error
        return Detections(*map(np.stack, zip(*map(_regions, images), strict=True)))


def _regions(image: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return boxes, scores, labels, masks and valid of the regions in which one colour is strong."""
    boxes, scores = np.zeros((_MOST, 4), np.float32), np.zeros(_MOST, np.float32)
    labels, masks = np.ones(_MOST, np.int32), np.zeros((_MOST, 28, 28), np.float32)
    found = []
    for channel in range(3):
        others = np.delete(image[..., :3], channel, axis=2).max(axis=2)
        count, regions, stats, _ = cv2.connectedComponentsWithStats(
            ((image[..., channel] > 96) & (others < 96)).astype(np.uint8)
        )
        for label in range(1, count):
            x, y, width, height, area = stats[label]
            if area >= 9:
                region = regions == label
                score = image[..., channel][region].mean() / 256
                mask = cv2.resize(region[y : y + height, x : x + width].astype(np.float32), (28, 28))
                found.append((score, [x, y, x + width, y + height], channel + 1, mask))
    for i, (score, box, label, mask) in enumerate(sorted(found, key=lambda item: -item[0])[:_MOST]):
        boxes[i], scores[i], labels[i], masks[i] = box, score, label, mask
    return boxes, scores, labels, masks, scores > 0


def draw_regions(size: int = 64) -> np.ndarray:
    """Return an image [size, size, 3] with a bright red square, a green circle with a hole and a dim blue square."""
    image = np.full((size, size, 3), 40, np.uint8)
    u = size // 16
    cv2.rectangle(image, (u, u), (6 * u, 6 * u), (250, 20, 20), cv2.FILLED)
    cv2.circle(image, (11 * u, 5 * u), 3 * u, (20, 200, 20), cv2.FILLED)
    cv2.circle(image, (11 * u, 5 * u), u, (40, 40, 40), cv2.FILLED)
    cv2.rectangle(image, (3 * u, 9 * u), (12 * u, 14 * u), (20, 20, 100), cv2.FILLED)
    return image


def encoded(image: np.ndarray, ending: str = ".png") -> bytes:
    """Return an RGB image as the content of a file."""
    return cv2.imencode(ending, image[..., ::-1])[1].tobytes()


class Running:
    """A service that listens."""

    def __init__(self, port: int, service: Service):
        self.port, self.service = port, service

    def ask(self, method: str, path: str, body=None, headers=None) -> tuple[http.client.HTTPResponse, bytes]:
        """Send a request on a connection of its own; returns the answer and its body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return response, response.read()

    def predict(self, body, query: str = "", headers=None) -> tuple[int, dict]:
        """Ask for a prediction; returns the status and the JSON."""
        response, content = self.ask("POST", f"/predict{query}", body, headers)
        return response.status, json.loads(content)


@contextlib.contextmanager
def running(model: Predictor, **limits) -> Iterator[Running]:
    """Run a service until the block ends."""
    limits = Limits(**({"timeout": 30.0} | limits))
    service = Service(model, limits, title="a <test>")
    listener = bind("127.0.0.1", 0)
    server = make_server(create_app(service), timeout=limits.timeout, metrics=service.metrics)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        yield Running(listener.getsockname()[1], service)
    finally:
        server.should_exit = True
        thread.join()
