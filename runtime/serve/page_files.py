"""The page at `/`: the files of the folder `page`, read once, each under its own name and no other."""

from __future__ import annotations

import hashlib
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_TYPES = {".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8",
          ".js": "text/javascript; charset=utf-8", ".svg": "image/svg+xml", ".png": "image/png"}


def page_routes() -> list[Route]:
    """A route for each file, and `/` for index.html; paths are compared whole, so none leads out of the folder."""
    folder, routes = files("vl2.runtime.serve").joinpath("page"), []
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name) if folder.is_dir() else ():
        suffix = "." + entry.name.rpartition(".")[2]
        if suffix in _TYPES and entry.is_file():
            path = "/" if entry.name == "index.html" else f"/{entry.name}"
            routes.append(Route(path, _page(entry.read_bytes(), _TYPES[suffix]), methods=["GET"]))
    return routes


def _page(content: bytes, media_type: str):
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {"ETag": tag, "Cache-Control": "no-cache"}

    async def serve(request: Request) -> Response:
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=media_type, headers=headers)

    return serve
