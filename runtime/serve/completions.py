"""POST /v1/chat/completions: from the body to the last byte of the answer, or to the client's leaving."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import anyio
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import Message as AsgiMessage
from starlette.types import Receive, Scope, Send

from vl2.image import ImageGeometry
from vl2.runtime.serve.api_error import ApiError
from vl2.runtime.serve.body import Account, PendingBytes, client_left, read_body
from vl2.runtime.serve.channel import Channel
from vl2.runtime.serve.image_bytes import image_bytes
from vl2.runtime.serve.images import check_images
from vl2.runtime.serve.remote import Fetch
from vl2.runtime.serve.reply import Reply
from vl2.runtime.serve.request import ChatRequest, RequestReader
from vl2.runtime.serve.settings import ServeSettings
from vl2.runtime.serve.worker import Job, Outcome, Worker

# Text that waits for a client; an answer of 2,048 tokens has about 10,000 characters.
_MOST_CHARACTERS = 262_144
# Fetching waits for other hosts; in threads of its own it holds up no request without such images.
_FETCHES = 4
# A thread holds one body as JSON, text and images; asyncio's own pool would have four more than there are cores.
_PARSERS = 2


class Completions:
    """The ASGI application of the endpoint."""

    def __init__(self, settings: ServeSettings, geometry: ImageGeometry, worker: Worker, fetch: Fetch):
        self._settings, self._geometry, self._worker, self._fetch = settings, geometry, worker, fetch
        self._reader = RequestReader(settings)
        self._pending = PendingBytes(settings.limits.room_for_requests)
        self._fetchers = ThreadPoolExecutor(_FETCHES, "vl2-fetch")
        self._parsers = ThreadPoolExecutor(_PARSERS, "vl2-parse")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises ApiError before anything is sent; after that errors go into the stream."""
        with self._pending.account(scope["state"]["client"]) as account:
            body = await read_body(Headers(scope=scope), receive, self._settings.limits, account)
            loop = asyncio.get_running_loop()
            request = await loop.run_in_executor(self._parsers, self._reader.read, body)
            del body
            images, pixels = await self._images(request, account)
            job = Job(scope["state"]["name"], scope["state"]["client"], request.turns, images, request.options,
                      Channel(_MOST_CHARACTERS), pixels)
            reply = Reply(job.name, self._settings.name, request.include_usage)
            self._worker.submit(job)
            await self._answer(job, reply, request.stream, (receive, send))

    async def _images(self, request: ChatRequest, account: Account) -> tuple[list[bytes], int]:
        """The encoded images of all turns, checked, and how many pixels they have together."""
        urls = [url for turn in request.turns for url in turn.images]
        remote = any(url[:6].lower() == "https:" for url in urls)
        loop = asyncio.get_running_loop()

        def load() -> tuple[list[bytes], int]:
            images = [image_bytes(url, self._settings, self._fetch) for url in urls]
            return images, check_images(images, self._settings.limits.pixels, self._geometry)

        images, pixels = await loop.run_in_executor(self._fetchers if remote else self._parsers, load)
        account.add(sum(map(len, images)))
        return images, pixels

    async def _answer(self, job: Job, reply: Reply, stream: bool, ways: tuple[Receive, Send]) -> None:
        receive, send = ways
        seconds = self._settings.limits.request_seconds
        late = ApiError(504, f"the request took longer than {seconds:.0f} s")
        timer = asyncio.get_running_loop().call_later(seconds, self._worker.drop, job, late)
        leaving = asyncio.ensure_future(_until_gone(receive))
        leaving.add_done_callback(lambda done: done.cancelled() or self._worker.drop(job, client_left()))
        try:
            await (self._stream if stream else self._whole)(job, reply, _patient(send, self._settings))
        finally:
            timer.cancel()
            leaving.cancel()
            self._worker.drop(job, client_left())

    async def _whole(self, job: Job, reply: Reply, send: Send) -> None:
        outcome: Outcome | None = None
        while outcome is None:
            outcome = (await job.channel.take()).end
        if isinstance(outcome, ApiError):
            raise outcome
        for message in _messages_of(JSONResponse(reply.whole(outcome))):
            await send(message)

    async def _stream(self, job: Job, reply: Reply, send: Send) -> None:
        taken = await job.channel.take()
        if isinstance(taken.end, ApiError) and not taken.text:
            raise taken.end
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store"),
                   (b"x-accel-buffering", b"no")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        pending = reply.first()
        while True:
            pending += reply.piece(taken.text) if taken.text else b""
            if taken.end is not None:
                break
            await send({"type": "http.response.body", "body": pending, "more_body": True})
            taken, pending = await job.channel.take(), b""
        pending += reply.failed(taken.end) if isinstance(taken.end, ApiError) else reply.last(taken.end)
        await send({"type": "http.response.body", "body": pending, "more_body": False})


def _messages_of(response: JSONResponse) -> list[AsgiMessage]:
    return [{"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers},
            {"type": "http.response.body", "body": response.body}]


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _patient(send: Send, settings: ServeSettings) -> Send:
    """`send` that gives a client up which takes nothing for too long. Raises ApiError 499."""

    async def send_in_time(message: AsgiMessage) -> None:
        try:
            with anyio.fail_after(settings.limits.stall_seconds):
                await send(message)
        except TimeoutError as error:
            raise client_left() from error

    return send_in_time
