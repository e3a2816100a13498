"""Refusals as OpenAI's clients know them."""

from __future__ import annotations

import logging
from typing import Any

from starlette.responses import JSONResponse

from vl2.errors import VL2Error

log = logging.getLogger("vl2.serve")

# The types that OpenAI's error object has, by status.
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error",
          500: "server_error", 503: "server_error", 504: "timeout_error"}


class ApiError(Exception):
    """A request that is not answered: status, what happened, the field it is about, a code for programs.

    retry_after: seconds, told to the client.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None,
                 retry_after: int | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after = retry_after

    def anew(self) -> ApiError:
        """The same without its traceback, which would keep all that its frames hold, such as decoded images."""
        return ApiError(self.status, self.message, self.param, self.code, self.retry_after)

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The whole answer."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers)


def refused(error: VL2Error, param: str | None = None) -> ApiError:
    """Status 400 out of an error of the user's world."""
    message = error.message if error.hint is None else f"{error.message} ({error.hint})"
    return ApiError(400, message, param)


def unknown_model(wanted: str, name: str) -> ApiError:
    """Status 404 for another model than the one that is served."""
    return ApiError(404, f"the model {wanted[:80]!r} is not served, expected {name!r}", "model", "model_not_found")


def shutting_down() -> ApiError:
    """Status 503 for what is ended, or comes, at the server's end."""
    return ApiError(503, "the server is shutting down")


def internal_error(name: str) -> ApiError:
    """Status 500 for the exception that is being handled; the log has its traceback under the request's name."""
    log.exception("%s failed", name)
    return ApiError(500, f"an error inside the server; its log has it under {name}", code=name)
