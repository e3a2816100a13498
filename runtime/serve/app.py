"""The server's parts put together: an opened model becomes an ASGI application."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, Router

from vl2.runtime import Model
from vl2.runtime.serve.api_error import unknown_model
from vl2.runtime.serve.completions import Completions
from vl2.runtime.serve.guard import Guard
from vl2.runtime.serve.metrics import CONTENT_TYPE, Metrics
from vl2.runtime.serve.openapi import describe
from vl2.runtime.serve.page_files import page_routes
from vl2.runtime.serve.remote import Fetch, RemoteImages
from vl2.runtime.serve.settings import ServeSettings
from vl2.runtime.serve.worker import Worker


class Service:
    """A model being served: `app` for an ASGI server, `worker` to be stopped at the end.

    fetch: gets remote images, for tests; None is the network within the settings.
    """

    def __init__(self, model: Model, settings: ServeSettings, fetch: Fetch | None = None):
        self.metrics = Metrics()
        self.worker = Worker(model, settings.limits, self.metrics, settings.batch)
        fetch = fetch or RemoteImages(settings.image_hosts, settings.limits.body_bytes)
        chat = Completions(settings, model.engine.processor.geometry, self.worker, fetch)
        page = page_routes()
        routes = [
            Route("/v1/chat/completions", chat, methods=["POST"]),
            *_model_routes(model, settings.name),
            Route("/health", _constant(lambda: self._health(model, settings.name)), methods=["GET"]),
            Route("/metrics", self._metrics_text, methods=["GET"]),
            Route("/openapi.json", _constant(lambda: describe(settings)), methods=["GET"]),
            *page,
        ]
        shown = frozenset(route.path for route in page) | {"/health", "/openapi.json"}
        known = frozenset(route.path for route in routes)
        self.app = Guard(Router(routes, redirect_slashes=False), settings, self.metrics, shown, known)
        self.worker.start()

    def _health(self, model: Model, name: str) -> dict[str, Any]:
        return {"status": "ok", "model": name, "backend": model.backend, "running": self.worker.running(),
                "waiting": self.worker.waiting()}

    async def _metrics_text(self, _: Request) -> Response:
        return Response(self.metrics.text(), media_type=CONTENT_TYPE)


def _constant(value: Callable[[], dict[str, Any]]):
    async def answer(_: Request) -> JSONResponse:
        return JSONResponse(value())

    return answer


def _model_routes(model: Model, name: str) -> list[Route]:
    facts = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "vl2",
             "max_model_len": model.manifest.language.max_position_embeddings}

    async def one(request: Request) -> JSONResponse:
        wanted = request.path_params["model"]
        if wanted != name:
            raise unknown_model(wanted, name)
        return JSONResponse(facts)

    return [Route("/v1/models", _constant(lambda: {"object": "list", "data": [facts]}), methods=["GET"]),
            Route("/v1/models/{model:path}", one, methods=["GET"])]
