"""A served small bundle: in memory for most tests, on a real port where connections matter."""

from __future__ import annotations

import asyncio
import base64
import io
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.runtime.small_bundle import NumpyBackend, SlotsBackend, numpy_model_of
from vl2.runtime import Model
from vl2.runtime.engine import Engine
from vl2.runtime.serve.app import Service
from vl2.runtime.serve.server import Server
from vl2.runtime.serve.settings import ServeSettings

CHAT = "/v1/chat/completions"
PATIENCE = 60  # seconds after which a test gives up on an event that should come at once


class Gated:
    """Of a backend: stops before a decoder run while the gate is shut; `reached` says that it stands there.

    shut_after: so many more decoder runs shut the gate; None never does.
    """

    def __init__(self):
        super().__init__()
        self.gate, self.reached = threading.Event(), threading.Event()
        self.gate.set()
        self.shut_after: int | None = None

    def run(self, graph, feeds, results):
        if graph == "decoder" and self.shut_after is not None:
            self.shut_after -= 1
            if self.shut_after < 0:
                self.shut_after = None
                self.gate.clear()
        if graph == "decoder" and not self.gate.is_set():
            self.reached.set()
            assert self.gate.wait(PATIENCE), "the test has not opened the gate"
        super().run(graph, feeds, results)


class GatedBackend(Gated, NumpyBackend):
    pass


class GatedSlots(Gated, SlotsBackend):
    pass


def gated_model_of(bundle: Path) -> tuple[Model, GatedBackend]:
    engine, backend = numpy_model_of(bundle).engine, GatedBackend()
    return Model(Engine(engine.manifest, engine.processor, engine.embeddings, backend)), backend


def png(size: tuple[int, int] = (40, 30), colour: str = "red", **save: Any) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG", **save)
    return file.getvalue()


def data_url(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def user(text: str, *urls: str) -> dict[str, Any]:
    """A user message with images before its text."""
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": "user", "content": [*images, {"type": "text", "text": text}]}


def question(text: str = "What is shown?", *urls: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [user(text, *urls)], "max_tokens": 6, **fields}


class InMemory:
    """Requests to an application without a network."""

    def __init__(self, service: Service):
        self.service = service

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        return asyncio.run(self._request(method, path, options))

    def ask(self, body: Any, **options: Any) -> httpx.Response:
        return self.request("POST", CHAT, json=body, **options)

    async def _request(self, method: str, path: str, options: dict[str, Any]) -> httpx.Response:
        transport = httpx.ASGITransport(self.service.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.request(method, path, **options)


@pytest.fixture
def served(shared_bundle: Path) -> Iterator[Callable[..., InMemory]]:
    """`served(**settings)`: the small bundle with these settings; limits={...} changes single limits."""
    services = []

    def start(limits: dict[str, Any] | None = None, fetch: Any = None, model: Model | None = None,
              **settings: Any) -> InMemory:
        services.append(Service(model or numpy_model_of(shared_bundle), with_limits(limits, settings), fetch))
        return InMemory(services[-1])

    yield start
    for service in services:
        service.worker.stop(PATIENCE)


def with_limits(limits: dict[str, Any] | None, settings: dict[str, Any]) -> ServeSettings:
    found = ServeSettings(**{"name": "small", **settings})
    return replace(found, limits=replace(found.limits, **(limits or {})))


@contextmanager
def on_a_port(model: Model, settings: ServeSettings) -> Iterator[tuple[str, Service]]:
    """(URL, service) of a server in a thread."""
    listening = socket.create_server(("127.0.0.1", 0))
    service, ready = Service(model, settings), threading.Event()
    server = Server(service, settings, ready.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    assert ready.wait(PATIENCE)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", service
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        service.worker.stop(PATIENCE)
