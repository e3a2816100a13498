"""What every request passes first and every answer last: host, token, headers, errors, counts."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import logging
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vl2.runtime.serve.api_error import ApiError, internal_error, shutting_down
from vl2.runtime.serve.metrics import Metrics
from vl2.runtime.serve.settings import ServeSettings

log = logging.getLogger("vl2.serve")

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
                               "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
_LEFT = 499


class Guard:
    """Wraps the application. open_paths: what is shown without a token; routes: paths that metrics tell apart.

    closing: set at the end, when requests are cancelled that are not even read.
    """

    closing = False

    def __init__(self, app: ASGIApp, settings: ServeSettings, metrics: Metrics, open_paths: frozenset[str],
                 routes: frozenset[str]):
        self._app, self._settings, self._metrics = app, settings, metrics
        self._open, self._routes = open_paths, routes
        self._tokens = [hashlib.sha256(token.encode()).digest() for token in settings.tokens]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An ASGI application; other protocols than HTTP are not answered."""
        if scope["type"] != "http":
            return
        seen = _Seen(send, f"req-{uuid.uuid4().hex[:16]}")
        # `app` makes Starlette's router raise what it cannot route, so that the answer is made here.
        scope = {**scope, "app": self, "state": {**scope.get("state", {}), "name": seen.name}}
        try:
            headers = Headers(scope=scope)
            self._check_host(headers)
            scope["state"]["client"] = self._client(scope, headers)
            await self._app(scope, receive, seen.send)
        except ApiError as error:
            await self._refuse(error, scope, receive, seen)
        except HTTPException as error:
            message = f"{scope['method'][:20]} {scope['path'][:80]}: {error.detail}"
            await self._refuse(ApiError(error.status_code, message), scope, receive, seen)
        except asyncio.CancelledError:
            if not self.closing:
                raise
            await self._refuse(shutting_down(), scope, receive, seen)
        except Exception:
            await self._refuse(internal_error(seen.name), scope, receive, seen)
        finally:
            self._count(scope, seen)

    async def _refuse(self, error: ApiError, scope: Scope, receive: Receive, seen: _Seen) -> None:
        if seen.status is not None or error.status == _LEFT:
            # The answer had begun, or nobody is there to get one.
            seen.status = error.status
            return
        response = error.response()
        if error.status == 405:
            response.headers["Allow"] = "POST" if scope["path"] == "/v1/chat/completions" else "GET, HEAD"
        await response(scope, receive, seen.send)

    def _check_host(self, headers: Headers) -> None:
        """A page of another site whose name was made to point here would send that name."""
        if self._tokens:
            return
        host = headers.get("host", "").lower()
        name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
        if name != "localhost" and name not in self._settings.host_names and not _is_loopback(name.strip("[]")):
            raise ApiError(403, f"the Host header is {host[:80]!r}, expected localhost or a loopback address "
                           "(--allow-host NAME admits others)", code="host_not_allowed")

    def _client(self, scope: Scope, headers: Headers) -> str:
        """Who asks, for the queue's turns: the token by its place in the file, and the address."""
        address = scope["client"][0] if scope.get("client") else "?"
        if not self._tokens or scope["path"] in self._open:
            return address
        kind, _, token = headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(token.strip().encode("utf-8", "surrogateescape")).digest()
        # All are compared, so that the time does not tell which one was near.
        equal = [hmac.compare_digest(digest, known) for known in self._tokens]
        if kind.lower() != "bearer" or not any(equal):
            raise ApiError(401, "the bearer token is missing or wrong", code="invalid_api_key")
        return f"token {equal.index(True) + 1} {address}"

    def _count(self, scope: Scope, seen: _Seen) -> None:
        path = scope["path"] if scope["path"] in self._routes else "other"
        status = _LEFT if seen.status is None else seen.status
        self._metrics.request(path, status)
        # Whoever watches asks for these every few seconds.
        level = logging.DEBUG if path in ("/health", "/metrics") and status == 200 else logging.INFO
        log.log(level, "%s %s %s %s %d %.0f ms", seen.name, scope["state"].get("client", "?"), scope["method"][:20],
                path, status, (time.monotonic() - seen.began) * 1e3)


class _Seen:
    """Adds the headers to an answer and remembers its status."""

    def __init__(self, send: Send, name: str):
        self._send, self.name = send, name
        self.status: int | None = None
        self.began = time.monotonic()

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(raw=list(message.get("headers", ())))
            for key, value in {**HEADERS, "X-Request-Id": self.name}.items():
                headers[key] = value
            message = {**message, "headers": headers.raw}
        await self._send(message)


def _is_loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
