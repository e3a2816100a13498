"""/openapi.json: what the server takes and gives, from the schemas that it checks requests with."""

from __future__ import annotations

from typing import Any

from vl2 import __version__
from vl2.runtime.serve.schema import CHUNK, COMPLETION, ERROR, HEALTH, MODEL, MODELS, request_schema
from vl2.runtime.serve.settings import ServeSettings

_REASONS = {
    "400": "Not understood, not supported or not possible; `param` names the field.",
    "401": "The bearer token is missing or wrong.",
    "403": "The Host header is not one of this server's.",
    "404": "No such model or path.",
    "408": "The body did not come in time.",
    "413": "The body or an image is too large.",
    "415": "The body is not application/json.",
    "429": "Too many requests wait; Retry-After tells when to come again.",
    "500": "A defect; the log has it under the name in `code`.",
    "503": "The server is shutting down.",
    "504": "The time limit of a request was reached.",
}
_RETRY = {"Retry-After": {"schema": {"type": "integer"}, "description": "Seconds."}}


def describe(settings: ServeSettings) -> dict[str, Any]:
    """The OpenAPI 3.1 description of a server with these settings."""
    guard = ["403"] if not settings.tokens else ["401"]
    ask = {
        "operationId": "createChatCompletion", "summary": "Answer a conversation.",
        "requestBody": {"required": True, "content": {"application/json": {"schema": request_schema(settings.limits)}}},
        "responses": {
            "200": {"description": "The answer; with `stream` as server-sent events, each `data:` a chunk, at last "
                    "`data: [DONE]`. An error after the first chunk comes as an event with the error object.",
                    "content": {"application/json": {"schema": COMPLETION}, "text/event-stream": {"schema": CHUNK}}},
            **_errors("400", "404", "408", "413", "415", "429", "500", "503", "504", *guard)}}
    description: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "vl2 serve", "version": __version__,
                 "description": "DeepSeek-VL2 behind OpenAI's chat completions."},
        "paths": {
            "/v1/chat/completions": {"post": _guarded(ask, settings)},
            "/v1/models": {"get": _guarded(_get("listModels", "The one model.", MODELS, guard), settings)},
            "/v1/models/{model}": {"get": _guarded(_model(guard), settings)},
            "/metrics": {"get": _guarded(_text("metrics", "Prometheus's text format.", guard), settings)},
            "/health": {"get": _get("health", "That the server lives, and how much waits.", HEALTH, _open(guard))},
        },
    }
    if settings.tokens:
        description["components"] = {"securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}}
    return description


def _guarded(operation: dict[str, Any], settings: ServeSettings) -> dict[str, Any]:
    return {**operation, "security": [{"token": []}]} if settings.tokens else operation


def _open(guard: list[str]) -> list[str]:
    """What a path may refuse that asks for no token."""
    return [status for status in guard if status != "401"]


def _errors(*statuses: str) -> dict[str, Any]:
    content = {"application/json": {"schema": ERROR}}
    return {status: {"description": _REASONS[status], "content": content, **({"headers": _RETRY} if status == "429"
                                                                              else {})}
            for status in statuses}


def _get(name: str, summary: str, schema: dict[str, Any], guard: list[str]) -> dict[str, Any]:
    found = {"description": summary, "content": {"application/json": {"schema": schema}}}
    return {"operationId": name, "summary": summary, "responses": {"200": found, **_errors("500", *guard)}}


def _model(guard: list[str]) -> dict[str, Any]:
    operation = _get("retrieveModel", "The model by its name.", MODEL, ["404", *guard])
    parameter = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
    return {**operation, "parameters": [parameter]}


def _text(name: str, summary: str, guard: list[str]) -> dict[str, Any]:
    found = {"description": summary, "content": {"text/plain": {"schema": {"type": "string"}}}}
    return {"operationId": name, "summary": summary, "responses": {"200": found, **_errors("500", *guard)}}
