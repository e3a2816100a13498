"""Reading a request's body: bounded in size, in what all bodies take together, and in patience."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import anyio
from starlette.datastructures import Headers
from starlette.types import Receive

from vl2.runtime.serve.api_error import ApiError
from vl2.runtime.serve.settings import Limits


def client_left() -> ApiError:
    """Status 499. Made anew each time: a raised error keeps its traceback, and by it the request's frames."""
    return ApiError(499, "the client left")


class PendingBytes:
    """Counts the bodies of all requests that are not finished. For one event loop."""

    def __init__(self, limit: int):
        self._limit, self._held = limit, 0

    @contextmanager
    def account(self) -> Iterator[Account]:
        """What one request takes, given back at its end."""
        account = Account(self)
        try:
            yield account
        finally:
            self._held -= account.size

    def take(self, size: int) -> None:
        """Raises ApiError 429 when no room is left."""
        if self._held + size > self._limit:
            raise ApiError(429, "too many large requests at once", code="queue_full", retry_after=5)
        self._held += size


class Account:
    """size: the bytes of one request so far."""

    def __init__(self, pending: PendingBytes):
        self._pending, self.size = pending, 0

    def add(self, size: int) -> None:
        """Raises ApiError 429 as PendingBytes.take."""
        self._pending.take(size)
        self.size += size


async def read_body(headers: Headers, receive: Receive, limits: Limits, account: Account) -> bytes:
    """The whole body of a JSON request. Raises ApiError 408, 413, 415, 429, and 499 when the client leaves."""
    if headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        # Also keeps pages of other sites out: a browser asks before it sends this type across origins.
        raise ApiError(415, f"the content type is {headers.get('content-type', 'not given')!r:.80}, "
                       "expected application/json")
    too_large = ApiError(413, f"the body is larger than {limits.body_bytes:,} bytes")
    announced = headers.get("content-length", "0")
    if announced.isdigit() and int(announced) > limits.body_bytes:
        raise too_large
    clock = asyncio.get_running_loop().time
    end, parts, more = clock() + limits.request_seconds, [], True
    while more:
        patience = min(limits.stall_seconds, end - clock())
        try:
            # asyncio.wait_for of Python 3.10 and 3.11 may swallow a cancellation.
            with anyio.fail_after(patience):
                message = await receive()
        except TimeoutError as error:
            raise ApiError(408, "the body did not come in time") from error
        if message["type"] == "http.disconnect":
            raise client_left()
        part = message.get("body", b"")
        account.add(len(part))
        if account.size > limits.body_bytes:
            raise too_large
        parts.append(part)
        more = message.get("more_body", False)
    return b"".join(parts)
