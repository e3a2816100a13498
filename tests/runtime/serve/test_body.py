"""Reading a request's body in the event loop."""

import asyncio

import pytest
from starlette.datastructures import Headers

from vl2.runtime.serve.api_error import ApiError
from vl2.runtime.serve.body import FREE_BYTES, PendingBytes, read_body
from vl2.runtime.serve.settings import Limits


@pytest.mark.parametrize("turns", range(4))
def test_a_request_that_is_cancelled_as_its_body_comes_ends(turns: int) -> None:
    async def ended_as_asked() -> bool:
        came = asyncio.Event()

        async def receive() -> dict:
            await came.wait()
            return {"type": "http.request", "body": b"{}"}

        with PendingBytes(100).account("a client") as account:
            headers = Headers({"content-type": "application/json"})
            reading = asyncio.ensure_future(read_body(headers, receive, Limits(), account))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            came.set()
            for _ in range(turns):
                await asyncio.sleep(0)
            asked = reading.cancel()  # False where it has been read already
            await asyncio.gather(reading, return_exceptions=True)
            return reading.cancelled() == asked

    assert asyncio.run(ended_as_asked())


MB = 1_000_000


def status_of(adding, size: int) -> int | None:
    try:
        adding(size)
    except ApiError as error:
        return error.status
    return None


def test_the_beginning_of_a_request_is_read_however_full_it_is() -> None:
    pending = PendingBytes(MB)
    with pending.account("a") as large, pending.account("a") as small, pending.account("b") as other:
        large.add(MB + FREE_BYTES)
        for account in (small, other):
            account.add(FREE_BYTES)
            assert status_of(account.add, 1) == 429


def test_one_client_leaves_half_of_the_room_to_the_others() -> None:
    pending = PendingBytes(10 * MB)
    with pending.account("a") as first, pending.account("a") as second, pending.account("b") as other:
        first.add(FREE_BYTES + 3 * MB)
        second.add(FREE_BYTES + MB)
        assert status_of(second.add, MB + 1) == 429
        second.add(MB)
        other.add(FREE_BYTES + 5 * MB)
    with pending.account("a") as again:
        again.add(FREE_BYTES + 10 * MB)  # nobody else, and given back


def test_a_request_too_large_by_itself_is_not_told_to_come_again() -> None:
    with PendingBytes(MB).account("a") as account:
        assert status_of(account.add, FREE_BYTES + MB + 1) == 413 and account.size == 0


def test_there_is_room_for_one_largest_request_with_its_images() -> None:
    assert Limits().room_for_requests == 100 * MB
    assert Limits(body_bytes=80 * MB).room_for_requests == 160 * MB
