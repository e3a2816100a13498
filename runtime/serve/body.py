"""Reading a request's body: bounded in size, in what all bodies take together, and in patience."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import anyio
from starlette.datastructures import Headers
from starlette.types import Receive

from vl2.runtime.serve.api_error import ApiError
from vl2.runtime.serve.settings import Limits

# Of each request: a long conversation in words; those of all connections together are 32 MB.
FREE_BYTES = 256 << 10


def client_left() -> ApiError:
    """Status 499. Made anew each time: a raised error keeps its traceback, and by it the request's frames."""
    return ApiError(499, "the client left")


class PendingBytes:
    """Counts the bodies and images of all requests that are not finished. For one event loop.

    limit: of all together. A client that has requests with large ones already is left half of it, so that others are
    served beside it; the first FREE_BYTES of a request are not counted, so that a question in words always is.
    """

    def __init__(self, limit: int):
        self._limit, self._held = limit, 0
        self._of_client: Counter[str] = Counter()

    @contextmanager
    def account(self, client: str) -> Iterator[Account]:
        """What one request takes, given back at its end."""
        account = Account(self, client)
        try:
            yield account
        finally:
            self._give_back(client, account.counted)

    def take(self, client: str, held: int, size: int) -> None:
        """Counts `size` more of a request that holds `held`.

        Raises ApiError 413 where it is too large by itself, 429 when no room is left.
        """
        if held + size > self._limit:
            raise ApiError(413, f"the request has more than {self._limit:,} bytes with its images")
        of_client = self._of_client[client]
        others_of_client = of_client - held
        if self._held + size > self._limit or (others_of_client and of_client + size > self._limit // 2):
            raise ApiError(429, "too many large requests at once", code="queue_full", retry_after=5)
        self._held += size
        self._of_client[client] += size

    def _give_back(self, client: str, size: int) -> None:
        self._held -= size
        self._of_client[client] -= size
        if not self._of_client[client]:  # else the names of all who ever came would stay
            del self._of_client[client]


class Account:
    """size: the bytes of one request so far; counted: those of them that take room."""

    def __init__(self, pending: PendingBytes, client: str):
        self._pending, self._client, self.size, self.counted = pending, client, 0, 0

    def add(self, size: int) -> None:
        """Raises ApiError as PendingBytes.take."""
        counted = max(0, self.size + size - FREE_BYTES)
        if counted > self.counted:
            self._pending.take(self._client, self.counted, counted - self.counted)
        self.size, self.counted = self.size + size, counted


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
