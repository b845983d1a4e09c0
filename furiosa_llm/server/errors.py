"""Errors as clients see them: one shape, OpenAI's, whatever went wrong; Anthropic's at the endpoints of its own."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import fields
from http import HTTPStatus
from typing import Any, Literal

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.responses import Response
from starlette.routing import Match, Route

from furiosa_llm.runtime.artifact.errors import FuriosaLLMError
from furiosa_llm.runtime.errors import ContextLengthError, EngineDeadError, SamplingParamsError
from furiosa_llm.runtime.tokens.sampling_params import SamplingParams
from furiosa_llm.server.fields import FORMS

logger = logging.getLogger(__name__)

REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="-")
"""The `x-request-id` of the request that is being answered, for the log."""

FOR_ANTHROPIC: ContextVar[bool] = ContextVar("for_anthropic", default=False)
"""Whether it has come to an endpoint of Anthropic's, whose errors have their own shape."""

_INVALID = "invalid_request_error"
_FAILED = "server_error"
_ANTHROPICS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
"""What Anthropic calls errors of these statuses."""
_FIELD = re.compile("(?!str$)[a-z_]+")
"""A part of a location that is a field, and not the type that was tried."""
_PARAMETERS = frozenset(field.name for field in fields(SamplingParams))
"""What messages about sampling parameters begin with, most of them."""


class ErrorInfo(BaseModel):
    """What went wrong. `param` is the field of the request that is to blame, `code` a name that programs may go by."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """The body of every answer that is an error."""

    error: ErrorInfo


class AnthropicError(BaseModel):
    """What went wrong, in Anthropic's words."""

    type: str
    message: str


class AnthropicErrorResponse(BaseModel):
    """The body of every answer of Anthropic's endpoints that is an error."""

    type: Literal["error"]
    error: AnthropicError
    request_id: str


class ApiError(HTTPException):
    """An error with the status that it is answered with."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        kind = _FAILED if status >= HTTPStatus.INTERNAL_SERVER_ERROR else _INVALID
        self.info = ErrorInfo(message=message, type=kind, param=param, code=code)


def api_error(error: FuriosaLLMError | ApiError) -> ApiError:
    """What `error` means to a client: a ValueError is the request's fault; what is the server's is logged."""
    if isinstance(error, ApiError):
        return error
    message = " ".join(str(error).split())
    match error:
        case EngineDeadError():
            return ApiError(503, message, code="engine_dead")
        case ContextLengthError():
            return ApiError(400, message, code="context_length_exceeded")
        case SamplingParamsError():
            first = re.split(r"\W", message, maxsplit=1)[0]
            return ApiError(400, message, param=first if first in _PARAMETERS else None)
        case ValueError():
            return ApiError(400, message)
        case _:
            logger.error("request %s failed: %s", REQUEST_ID.get(), message)
            return ApiError(500, message)


def blamed(error: SamplingParamsError, form_field: str) -> ApiError:
    """The same, of a request that says in `form_field` what its answers have to look like: the engine has one name."""
    found = api_error(error)
    if "structured_outputs" not in found.info.message:
        return found
    return ApiError(400, found.info.message.replace("structured_outputs", form_field, 1), param=form_field)


INTERNAL_ERROR = ApiError(500, "the server failed at this request; its log says why")


def error_body(error: ApiError) -> bytes:
    """The answer's body, in ASCII: messages quote what was sent, which may not be encodable."""
    shown: dict[str, Any] = {"error": error.info.model_dump()}
    if FOR_ANTHROPIC.get():
        by_status = _INVALID if error.status_code < HTTPStatus.INTERNAL_SERVER_ERROR else "api_error"
        about = {"type": _ANTHROPICS.get(error.status_code, by_status), "message": error.info.message}
        shown = {"type": "error", "error": about, "request_id": REQUEST_ID.get()}
    return json.dumps(shown, separators=(",", ":")).encode()


def error_event(error: ApiError) -> bytes:
    """The last event of a stream."""
    return (b"event: error\n" if FOR_ANTHROPIC.get() else b"") + b"data: " + error_body(error) + b"\n\n"


def error_response(error: ApiError) -> Response:
    """The answer."""
    return Response(error_body(error), error.status_code, error.headers, "application/json")


def install_handlers(app: FastAPI) -> None:
    """Makes `app` answer every error in one shape."""

    async def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, StarletteHTTPException)
        return error_response(_shaped(request, error))

    async def on_our_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, FuriosaLLMError)
        return error_response(api_error(error))

    async def on_invalid_body(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return error_response(_invalid(error.errors()))

    app.add_exception_handler(StarletteHTTPException, on_http_error)
    app.add_exception_handler(FuriosaLLMError, on_our_error)
    app.add_exception_handler(RequestValidationError, on_invalid_body)


def _shaped(request: Request, error: StarletteHTTPException) -> ApiError:
    """The framework's own errors in our shape."""
    if isinstance(error, ApiError):
        return error
    message = error.detail
    if error.status_code in (HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED):
        message = f"{request.method} {request.url.path[:200]}: {message}; /openapi.json lists what there is"
    headers = dict(error.headers or {})
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        headers["Allow"] = ", ".join(_methods(request))
    return ApiError(error.status_code, message, headers=headers)


def _methods(request: Request) -> list[str]:
    """What the request's path takes, by all of its routes: the framework names those of the first one."""
    routers = [getattr(route, "original_router", None) for route in request.app.routes]
    routes = [*request.app.routes, *(route for router in routers if router is not None for route in router.routes)]
    fitting = [one for one in routes if isinstance(one, Route) and one.matches(request.scope)[0] is not Match.NONE]
    names = {name for one in fitting for name in one.methods or ()}
    return sorted(names | {"HEAD"} if "GET" in names else names)


def _invalid(found: Any) -> ApiError:
    """The first of pydantic's complaints; of a field that may hold several types, the one that says most."""
    first = found[0]
    where = [part for part in first["loc"] if part != "body" and part not in FORMS]
    # The name of the type that was tried may follow the field's name.
    param = str(where[0]) if where and isinstance(where[0], str) else None
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"Unrecognized request argument supplied: {'.'.join(map(str, where))[:200]}", param=param)
    same = [one for one in found if [part for part in one["loc"] if part != "body"][:1] == where[:1]]
    if param == "messages":
        # Of an object within an object the complaint that is nearest to what is wrong says where that is.
        same = [max(same, key=lambda one: len(one["loc"]))]
        where = [part for part in same[0]["loc"] if isinstance(part, int) or _FIELD.fullmatch(part)][1:]
    messages = dict.fromkeys(one["msg"].removeprefix("Value error, ") for one in same)
    path = ".".join(map(str, where))[:200] if len(same) == 1 else param
    return ApiError(400, f"{path or 'the body'}: {'; or '.join(messages)[:500]}", param=param)
