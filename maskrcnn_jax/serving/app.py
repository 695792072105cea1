"""The service as an ASGI application: a page, predictions, health and metrics."""

import asyncio
import contextlib
import functools
import math
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Collection
from concurrent.futures import ThreadPoolExecutor

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from maskrcnn_jax.errors import UserError
from maskrcnn_jax.inference.detections import ImageDetections
from maskrcnn_jax.inference.selection import MIN_SCORE
from maskrcnn_jax.page import TEMPLATES, render
from maskrcnn_jax.serving.answers import FORMATS, MASKS, encode
from maskrcnn_jax.serving.batching import Batcher, Model
from maskrcnn_jax.serving.limits import Limits
from maskrcnn_jax.serving.metrics import CONTENT_TYPE, Metrics
from maskrcnn_jax.serving.other_sites import OwnSiteOnly
from maskrcnn_jax.serving.uploads import GONE, decode, read_body

_PATHS = ("/", "/predict", "/health", "/metrics")
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    # The page consists of itself, and of what the user drops on it.
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "img-src blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}


class Service:
    """Answers requests with a model."""

    def __init__(self, model: Model, limits: Limits, *, title: str):
        """Start the thread that computes.

        Args:
            model: A predictor.
            limits: What is refused.
            title: Of the page.
        """
        self._model, self._limits, self._title = model, limits, title
        self.metrics = Metrics(limits.max_batch)
        self._batcher = Batcher(model, max_batch=limits.max_batch, metrics=self.metrics)
        self._threads = ThreadPoolExecutor(min(8, os.cpu_count() or 1), "images")
        # Files wait as they came. Only so many are held decoded, which may take a hundred times the memory.
        self._decoded = asyncio.Semaphore(2 * limits.max_batch)
        self._in_work = 0

    def close(self) -> None:
        """Compute what waits, and end the threads."""
        self._batcher.close()
        self._threads.shutdown()

    async def page(self, request: Request) -> Response:
        """Answer with the page on which an image can be dropped."""
        names = list(self._model.categories.names)
        limits = {"bytes": self._limits.max_bytes, "pixels": self._limits.max_pixels}
        page = render(TEMPLATES / "serve.html.j2", title=self._title, names=names, limits=limits, min_score=MIN_SCORE)
        return HTMLResponse(page)

    async def health(self, request: Request) -> Response:
        """Answer that the service is up: it listens only when its programs are compiled."""
        return JSONResponse({"status": "ok", "queue_length": len(self._batcher)})

    async def show_metrics(self, request: Request) -> Response:
        """Answer with the metrics in Prometheus's format."""
        text = self.metrics.render(queue_length=len(self._batcher), in_work=self._in_work)
        return PlainTextResponse(text, media_type=CONTENT_TYPE)

    async def predict(self, request: Request) -> Response:
        """Answer with what the model finds in the image that is the body of the request."""
        start = time.monotonic()
        min_score, form, masks = _parameters(request)
        if self._in_work >= self._limits.max_queue:
            raise HTTPException(
                503, f"{self._in_work} images are waiting; try again later", {"Retry-After": self._patience()}
            )
        self._in_work += 1
        try:
            data = await read_body(request, self._limits)
            content = await self._answer(request, data, min_score, form, masks)
        finally:
            self._in_work -= 1
            self.metrics.request_seconds.observe(time.monotonic() - start)
        return Response(content, media_type=FORMATS[form])

    async def _answer(self, request: Request, data: bytes, min_score: float, form: str, masks: str) -> bytes:
        """Return the body of the answer, unless it takes too long or the client leaves."""
        work = asyncio.ensure_future(self._compute(data, min_score, form, masks))
        left = asyncio.ensure_future(request.receive())  # after the body comes only that the client has left
        try:
            await asyncio.wait({work, left}, timeout=self._limits.timeout, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return work.result()
            if left.done():
                raise HTTPException(GONE, "the client has left")
            raise HTTPException(
                504,
                f"there was no answer within {self._limits.timeout:g} s; try again later",
                {"Retry-After": self._patience()},
            )
        finally:
            for task in (work, left):
                task.cancel()
            await asyncio.gather(work, left, return_exceptions=True)

    async def _compute(self, data: bytes, min_score: float, form: str, masks: str) -> bytes:
        run = functools.partial(asyncio.get_running_loop().run_in_executor, self._threads)
        channels = self._model.options.model.in_channels
        async with self._decoded:
            prepared = await run(lambda: self._model.prepare(decode(data, channels, self._limits)))
            found = await asyncio.wrap_future(self._batcher.submit(prepared))
            return await run(_chosen, found, min_score, form, masks)

    def _patience(self) -> str:
        """Return after how many seconds to try again: about what the images that wait will take."""
        return str(max(1, math.ceil(self._in_work * self.metrics.seconds_per_image())))


def _chosen(found: ImageDetections, min_score: float, form: str, masks: str) -> bytes:
    try:
        return encode(found[found.scores >= min_score], form, masks)
    except UserError as error:
        raise HTTPException(422, str(error)) from None


def _parameters(request: Request) -> tuple[float, str, str]:
    """Return min_score, format and masks of a request.

    Raises:
        HTTPException: one has a value that is not allowed, or is there twice, or there is another.
    """
    given = dict(request.query_params)
    for name, times in Counter(name for name, _ in request.query_params.multi_items()).items():
        if times > 1:
            raise HTTPException(400, f"{name[:100]} is given {times} times; give it once")
    text = given.pop("min_score", str(MIN_SCORE))
    try:
        min_score = float(text)
    except ValueError:
        min_score = math.nan
    if not 0 <= min_score <= 1:
        raise HTTPException(400, f"min_score is {text[:100]!r}; give a number from 0 to 1")
    form, masks = given.pop("format", "json"), given.pop("masks", "rle")
    for name, value, choices in (("format", form, tuple(FORMATS)), ("masks", masks, MASKS)):
        if value not in choices:
            raise HTTPException(400, f"{name} is {value[:100]!r}; choose one of {', '.join(choices)}")
    if given:
        unknown = next(iter(given))[:100]
        raise HTTPException(400, f"there is no parameter {unknown!r}; use min_score, format and masks")
    return min_score, form, masks


class _Counted:
    """Counts answers by their status, and adds headers to them."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = scope["path"] if scope["path"] in _PATHS else "other"
                self._metrics.count_request(path, message["status"])
                extra = [(name.lower().encode(), value.encode()) for name, value in _HEADERS.items()]
                message["headers"] = [*message["headers"], *extra]
            await send(message)

        await self._app(scope, receive, send_counted if scope["type"] == "http" else send)


async def _refuse(request: Request, error: Exception) -> Response:
    """Answer an HTTPException with its sentence."""
    assert isinstance(error, HTTPException)
    sentence = error.detail
    if error.status_code == 404:
        sentence = f"there is no page {request.scope['path'][:100]!r}; use {', '.join(_PATHS)}"
    elif error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        sentence = f"{request.scope['path']} does not take {request.method[:20]}; use {allowed}"
    return JSONResponse({"error": sentence}, error.status_code, error.headers)


async def _fail(request: Request, error: Exception) -> Response:
    """Answer an error that is none of the client's; the server logs it."""
    return JSONResponse({"error": "the service failed at this request; its log says why"}, 500)


def create_app(service: Service, *, names: Collection[str] | None = None) -> ASGIApp:
    """Return the application of a service; it closes the service when it shuts down.

    Args:
        service: What answers.
        names: By which the service is called, besides localhost and IP addresses; None allows all names.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        service.close()

    app = Starlette(
        routes=[
            Route("/", service.page),
            Route("/predict", service.predict, methods=["POST"]),
            Route("/health", service.health),
            Route("/metrics", service.show_metrics),
        ],
        exception_handlers={HTTPException: _refuse, Exception: _fail},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False  # the address would be taken from the request's Host
    return _Counted(OwnSiteOnly(app, names), service.metrics)  # around everything, so that it sees failures
