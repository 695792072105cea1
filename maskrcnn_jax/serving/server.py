"""The HTTP server: uvicorn, with limits on slow and broken connections that it lacks."""

import asyncio
import errno
import json
import logging
import socket

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from maskrcnn_jax.errors import UserError
from maskrcnn_jax.serving.metrics import Metrics

_LAST_PORT = 65535
_MAX_CONNECTIONS = 512  # half of the files that Linux lets a process open by default
_GRACE = 2.0  # seconds more than the application allows, which can say more about the request
# Seconds in which the rest of a refused upload is read and dropped: most clients read no answer before they have sent
# everything, and never see one if the connection is closed before.
_LINGER = 5.0


class _Connection(H11Protocol):
    """Ends connections whose requests do not arrive in time, and answers in JSON what is not HTTP.

    uvicorn waits for ever for the headers of a request, and for the rest of a body that was refused.
    """

    timeout: float  # seconds
    metrics: Metrics
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the time of the first request."""
        super().connection_made(transport)
        self._start_timer(self.timeout)
        if len(self.connections) > _MAX_CONNECTIONS:
            self._refuse(503, "too many connections are open; try again later")

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the time."""
        if self._timer:
            self._timer.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """Start the time of the next request, or of the rest of this one."""
        self._start_timer(min(_LINGER, self.timeout) if self.conn.their_state is h11.SEND_BODY else self.timeout)
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """Answer what h11 cannot read."""
        self._refuse(400, "this is not a valid HTTP request; send an image with POST /predict")

    def _start_timer(self, seconds: float) -> None:
        if self._timer:
            self._timer.cancel()
        self._timer = self.loop.call_later(seconds, self._expire)

    def _expire(self) -> None:
        if self.transport.is_closing():
            self.transport.abort()  # the answer, which is not being read
        elif self.conn.our_state is h11.IDLE:
            self._refuse(408, f"no complete request came within {self.timeout:g} s; send it at once")
        elif self.cycle.response_complete:
            self.transport.abort()
        # Otherwise the application reads or computes, with limits of its own.

    def _refuse(self, code: int, sentence: str) -> None:
        """Answer without the application, and close the connection."""
        if self.transport.is_closing():
            return
        if self.cycle is not None and not self.cycle.response_complete:  # for the application the client has left
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps({"error": sentence}).encode()
            headers = [
                ("content-type", "application/json"),
                ("content-length", str(len(body))),
                ("connection", "close"),
            ]
            events = (h11.Response(status_code=code, headers=headers), h11.Data(data=body), h11.EndOfMessage())
            self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
            self.metrics.count_request("other", code)
        self.transport.close()
        self._start_timer(_LINGER)  # for a client that does not read its answer


def bind(host: str, port: int) -> socket.socket:
    """Reserve an address, for no other process; connections are refused until :func:`listen`.

    Raises:
        UserError: the address does not exist, is taken, or not allowed.
    """
    if not 0 <= port <= _LAST_PORT:  # the system would take the remainder
        raise _cannot_listen(host, port, f"ports are numbers from 0 to {_LAST_PORT}")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        try:
            return _bind(found, reuse=False)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            return _bind(found, reuse=True)  # connections that have just ended hold the port for a minute
    except (OSError, UnicodeError) as error:
        raise _cannot_listen(host, port, getattr(error, "strerror", None) or "no such host") from None


def _bind(found: tuple, *, reuse: bool) -> socket.socket:
    """Bind a socket to what ``getaddrinfo`` has found."""
    family, kind, protocol, _, address = found
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
        listener.bind(address)
        # Until a socket listens, those that reuse addresses could bind to the same one.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, False)
    except BaseException:
        listener.close()
        raise
    return listener


def listen(listener: socket.socket) -> None:
    """Let connections come.

    Raises:
        UserError: another process listens at this address by now.
    """
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, True)  # its connections inherit it
        listener.listen()
    except OSError as error:
        host, port = listener.getsockname()[:2]
        raise _cannot_listen(host, port, error.strerror or error) from None


def _cannot_listen(host: str, port: int, reason: object) -> UserError:
    return UserError(f"the service cannot listen on {host}:{port} ({reason}); give another --host or --port")


def make_server(app: ASGIApp, *, timeout: float, metrics: Metrics) -> uvicorn.Server:
    """Return a server that has not started.

    Args:
        app: The application.
        timeout: Seconds for a request to arrive; as many again to finish what is in work when the server stops.
        metrics: Where refused requests are counted.
    """
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # it warns of every request that is not HTTP
    connection = type("Connection", (_Connection,), {"timeout": timeout + _GRACE, "metrics": metrics})
    config = uvicorn.Config(
        app,
        http=connection,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=max(1, round(timeout)),
    )
    return uvicorn.Server(config)
