"""Listening, and ending in order: `serve` returns after SIGTERM or SIGINT, when what ran has ended."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from vl2.errors import VL2Error
from vl2.runtime import Model
from vl2.runtime.serve.app import Service
from vl2.runtime.serve.settings import ServeSettings

GRACE_SECONDS = 10
_BACKLOG = 128
# A connection on which no request comes is closed after them.
_SILENT_SECONDS = 15
# Of the request line and headers; longer ones are answered 400 by uvicorn.
_HEADER_BYTES = 16384


def listen(host: str, port: int, tokens: tuple[str, ...]) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises VL2Error beyond loopback without a token, for a host that is not this machine's and a port that is taken.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, UnicodeError) as error:
        raise VL2Error(f"the host {host!r} has no address: {error}", "give an address of this machine") from error
    if not tokens and not ipaddress.ip_address(address[0].partition("%")[0]).is_loopback:
        raise VL2Error(f"{host} can be reached from other machines and no token guards the model",
                       "give --token-file FILE or VL2_SERVE_TOKEN, or listen on 127.0.0.1")
    # The checked address, not the name: it could have another one by now.
    try:
        return socket.create_server(address[:2], family=family, backlog=_BACKLOG)
    except OSError as error:
        raise VL2Error(f"{host} port {port} cannot be listened on: {error.strerror or error}",
                       "give another --port; 0 takes a free one") from error


def serve(model: Model, settings: ServeSettings, listening: socket.socket,
          ready: Callable[[], None] = lambda: None) -> None:
    """Serves until SIGTERM or SIGINT; running answers then have GRACE_SECONDS. ready: called once it listens."""
    service = Service(model, settings)
    try:
        with _quiet_signals():
            Server(service, settings, ready).run(sockets=[listening])
    finally:
        service.worker.stop(GRACE_SECONDS)
        listening.close()


class Server(uvicorn.Server):
    """Lets go of what waits as soon as the end is wanted."""

    def __init__(self, service: Service, settings: ServeSettings, ready: Callable[[], None]):
        super().__init__(uvicorn.Config(
            service.app, http=_Protocol, ws="none", lifespan="off", log_config=None, access_log=False,
            server_header=False, limit_concurrency=settings.limits.connections, timeout_keep_alive=_SILENT_SECONDS,
            h11_max_incomplete_event_size=_HEADER_BYTES, timeout_graceful_shutdown=GRACE_SECONDS))
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
        self._service, self._ready = service, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.worker.close_queue()
        await super().shutdown(sockets)


class _Protocol(H11Protocol):
    """Closes connections that send no whole request head in time; uvicorn itself waits for it without end."""

    _silence: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._silence.cancel()

    def _watch(self) -> None:
        if self._silence is not None:
            self._silence.cancel()
        self._silence = self.loop.call_later(self.timeout_keep_alive, self._close_if_silent)

    def _close_if_silent(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


@contextlib.contextmanager
def _quiet_signals() -> Iterator[None]:
    """uvicorn ends on a signal and then raises it once more; an orderly end is no failure."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
