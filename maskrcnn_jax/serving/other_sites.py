"""Refuses requests of web pages of other sites, which run in the browsers of people who can reach the service.

A page can send an image from there to any address. And if the name of its site is made to resolve to this computer
("DNS rebinding"), the browser takes the service for that site, and the page reads its answers.
"""

import contextlib
import ipaddress
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send


class OwnSiteOnly:
    """Answers 403 to requests of other sites, and passes on all others."""

    def __init__(self, app: ASGIApp, names: Collection[str] | None):
        """Wrap an application.

        Args:
            app: The application.
            names: By which it is called, besides localhost and IP addresses; None allows all names.
        """
        self._app, self._names = app, names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        sentence = self._refusal(Headers(scope=scope), scope["method"]) if scope["type"] == "http" else ""
        app = JSONResponse({"error": sentence}, 403) if sentence else self._app
        await app(scope, receive, send)

    def _refusal(self, headers: Headers, method: str) -> str:
        """Return why a request is refused; nothing if it is not."""
        host = headers.get("host", "localhost")
        # Links from other sites to the page are fine.
        if method == "POST" and _is_from_elsewhere(headers, host):
            return "a web page of another site sent this; use the page of the service, or a program outside a browser"
        if self._names is not None and not _is_local(name := _hostname(host)) and name not in self._names:
            return f"the service is not called {host[:100]!r}; use its address, or start it with --public_names"
        return ""


def _is_from_elsewhere(headers: Headers, host: str) -> bool:
    """Return whether a browser says that a page of another site sent a request; other programs say nothing."""
    # Sent to HTTPS and to this computer. It holds behind a proxy that changes the Host, where the Origin differs.
    site = headers.get("sec-fetch-site")
    if site is not None:
        return site in ("cross-site", "same-site")
    origin = headers.get("origin")
    return origin is not None and origin.lower() not in (f"http://{host.lower()}", f"https://{host.lower()}")


def _hostname(host: str) -> str:
    """Return the name of a Host header without the port; nothing if it has none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _is_local(name: str) -> bool:
    """Return whether a name always means this computer, or is an address, which no site can point elsewhere."""
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(name))
    return name == "localhost" or name.endswith(".localhost")
