"""Reading a request's body in the event loop."""

import asyncio

import pytest
from starlette.datastructures import Headers

from vl2.runtime.serve.body import PendingBytes, read_body
from vl2.runtime.serve.settings import Limits


@pytest.mark.parametrize("turns", range(4))
def test_a_request_that_is_cancelled_as_its_body_comes_ends(turns: int) -> None:
    async def ended_as_asked() -> bool:
        came = asyncio.Event()

        async def receive() -> dict:
            await came.wait()
            return {"type": "http.request", "body": b"{}"}

        with PendingBytes(100).account() as account:
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
