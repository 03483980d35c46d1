"""Errors as OpenAI's API writes them: ``{"error": {"message", "type", "param", "code"}}``. Knows no routes."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from pearl_ray.core.errors import (
    ConfigError,
    EngineDeadError,
    PearlError,
    QueueFullError,
    RequestRefusedError,
    quoted,
)

logger = logging.getLogger(__name__)

_TYPES = {401: "authentication_error", 429: "rate_limit_error"}
RETRY_AFTER_S = 1
_NAME_CHARS = 64
_BRANCHES = frozenset(["str", "NamedToolChoice"])  # of unions in the bodies


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: of HTTP.
        message: one sentence for the developer who made the request.
        param: the field of the body that it is about.
        code: a fixed word that a program can act on.
        headers: to be sent with it.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, dict[str, str | None]]:
        """As OpenAI's."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The HTTP answer. ASCII JSON: a message may quote a lone surrogate out of the request, which UTF-8 can't."""
        content = json.dumps(self.body(), ensure_ascii=True)
        return Response(content, self.status, self.headers, media_type="application/json")


def too_many(message: str, code: str) -> ApiError:
    """429, with the time after which to try again."""
    return ApiError(429, message, code=code, headers={"Retry-After": str(RETRY_AFTER_S)})


def unavailable(message: str, code: str = "unavailable") -> ApiError:
    """503, with the time after which to try again."""
    return ApiError(503, message, code=code, headers={"Retry-After": str(RETRY_AFTER_S)})


def as_api_error(error: Exception) -> ApiError:
    """What a client is told of an error of the engine; of an unforeseen one it is told nothing but that."""
    match error:
        case ApiError():
            return error
        case ConfigError():
            return ApiError(400, str(error), param=error.field, code="invalid_value")
        case RequestRefusedError():
            return ApiError(400, str(error), code="request_refused")
        case QueueFullError():
            return too_many(str(error), "queue_full")
        case EngineDeadError():
            return unavailable(str(error), "engine_dead")
        case PearlError():
            return ApiError(500, str(error), code="engine_error")
        case _:
            return ApiError(500, "internal server error; the server's log has the cause", code="internal_error")


def invalid_body(errors: Sequence[Mapping[str, object]]) -> ApiError:
    """One of pydantic's complaints: of an unknown field first, of a type last (a union complains of every branch)."""
    first = min(errors, key=lambda error: (error["type"] != "extra_forbidden", str(error["type"]).endswith("_type")))
    location = first["loc"]
    assert isinstance(location, tuple)
    path = [_shown(str(part)) for part in location[1:] if not _names_a_type(part)]
    param = ".".join(path) or None
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"unrecognized request field: {param}", param=param, code="unknown_parameter")
    if first["type"] == "json_invalid":
        return ApiError(400, "the request body is not valid JSON", code="invalid_json")
    where = f"{param}: " if param else ""
    found = f", not {quoted(first['input'])}" if param and first["type"] != "missing" else ""
    return ApiError(400, f"{where}{first['msg']}{found}", param=param, code="invalid_value")


def _shown(name: str) -> str:
    """A field's name, which may be anything that the body holds: as it is, or quoted where that breaks the line."""
    return name if name.isprintable() and 0 < len(name) <= _NAME_CHARS else quoted(name)


def _names_a_type(part: object) -> bool:
    """Whether this part of a complaint's location is pydantic's name of a union's branch, and not the user's field."""
    return isinstance(part, str) and (
        part in _BRANCHES or part.startswith(("list[", "dict[", "constrained-", "literal["))
    )


def install_error_handlers(app: FastAPI) -> None:
    """Every error of the app, unknown paths and methods too, leaves in OpenAI's form."""

    async def on_known(_request: Request, error: Exception) -> Response:
        return as_api_error(error).response()

    async def on_invalid(_request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return invalid_body(error.errors()).response()

    async def on_http(_request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        return ApiError(error.status_code, str(error.detail), code=code, headers=error.headers).response()

    app.add_exception_handler(ApiError, on_known)
    app.add_exception_handler(PearlError, on_known)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(Exception, on_known)
