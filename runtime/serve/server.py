"""Listening, and ending in order: `serve` returns after SIGTERM or SIGINT, when what ran has ended."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ipaddress
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from vl2.errors import VL2Error
from vl2.runtime import Model
from vl2.runtime.serve.app import Service
from vl2.runtime.serve.settings import Limits, ServeSettings

GRACE_SECONDS = 10
# What of it is left for sending what an answer ends with that outlasts the grace.
_FAREWELL_SECONDS = 1
_BACKLOG = 128
# A connection on which no request comes is closed after them.
_SILENT_SECONDS = 15
# Of the request line and headers; longer ones are answered 400 by uvicorn.
_HEADER_BYTES = 16384
# What the system may hold unsent of a connection. By default megabytes, whose reading by a slow client would not show.
_UNSENT_BYTES = 65536


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
            service.app, http=functools.partial(_Protocol, settings.limits), ws="none", lifespan="off", log_config=None,
            access_log=False, server_header=False, limit_concurrency=settings.limits.connections,
            timeout_keep_alive=_SILENT_SECONDS, h11_max_incomplete_event_size=_HEADER_BYTES,
            timeout_graceful_shutdown=GRACE_SECONDS))
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
        self._service, self._ready = service, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        worker = self._service.worker
        worker.close_queue()
        self._service.app.closing = True
        # uvicorn itself would cancel the answers, which the client sees as an error inside the server.
        ending = asyncio.get_running_loop().call_later(max(0, GRACE_SECONDS - _FAREWELL_SECONDS), worker.end_all)
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()


class _Protocol(H11Protocol):
    """Closes connections that send no whole request head in time or do not read; uvicorn itself waits without end."""

    def __init__(self, limits: Limits, *given: Any, **named: Any):
        super().__init__(*given, **named)
        self._limits = limits
        self._silence: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        # Any byte that is not taken counts as writing that pauses, also the last ones of an answer.
        transport.set_write_buffer_limits(high=0)
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT_BYTES)
        self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._expect_reading(self.loop.time() + self._limits.request_seconds)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stall.cancel()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in filter(None, (self._silence, self._stall)):
            timer.cancel()

    def _expect_reading(self, end: float) -> None:
        """Ends the connection where less has been taken than one byte in `stall_seconds`, or not all by `end`.

        `close` would wait for the client to read.
        """
        seconds = min(self._limits.stall_seconds, end - self.loop.time())
        self._stall = self.loop.call_later(seconds, self._end_if_stalled, self._unsent(), end)

    def _end_if_stalled(self, unsent: int, end: float) -> None:
        if self._unsent() >= unsent or self.loop.time() >= end:
            self.transport.abort()
        else:
            self._expect_reading(end)

    def _unsent(self) -> int:
        return self.transport.get_write_buffer_size()

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
