"""The OpenAPI document: what FastAPI makes of the endpoints, and what only the running server knows.

That is the names of the model, whether a key is needed, and the errors that come from around the endpoints.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from furiosa_llm.server.errors import AnthropicErrorResponse, ErrorResponse
from furiosa_llm.server.responses import ChatCompletionChunk, CompletionChunk

OPEN_PATHS = frozenset({"/health", "/version", "/metrics", "/openapi.json"})
"""What needs no key: nothing there is anybody's, and those who watch over a server have none."""

_REASONS = {
    400: "The request does not make sense.",
    401: "The API key is missing or wrong.",
    404: "There is no such model.",
    408: "The body takes too long to arrive.",
    413: "The body is too large.",
    415: "The body is not said to be JSON, or compressed in a way that is not known.",
    429: "Too many sequences run or wait; Retry-After says when to come back.",
    500: "The server is at fault.",
    503: "The engine is dead, no replica runs at the moment, or the server is stopping.",
    504: "The request takes longer than the server's --request-timeout.",
}
_READING = (400, 404, 408, 413, 415, 500)

_REQUEST_ID = {"schema": {"type": "string", "pattern": "^[0-9a-f]{32}$"}, "required": True}
_HEADERS: dict[str, dict[str, Any]] = {
    "401": {"WWW-Authenticate": {"schema": {"type": "string"}, "required": True}},
    "429": {"Retry-After": {"schema": {"type": "integer", "minimum": 1}, "required": True}},
}

_REFERENCE = "#/components/schemas/{model}"

CHUNKS: tuple[type[BaseModel], ...] = (CompletionChunk, ChatCompletionChunk)
"""The pieces of streams."""

Responses = dict[int | str, dict[str, Any]]


def errors(*statuses: int, model: type[BaseModel] = ErrorResponse) -> Responses:
    """The answers of these statuses."""
    return {status: {"model": model, "description": _REASONS[status]} for status in statuses}


def is_anthropics(path: str) -> bool:
    """Whether the endpoint is one of Anthropic's protocol."""
    return path == "/v1/messages" or path.startswith("/v1/messages/")


GENERATING = errors(*_READING, 429, 503, 504)
"""Of endpoints that run the model."""

ANTHROPICS = errors(*_READING, 429, 503, 504, model=AnthropicErrorResponse)
"""Of those of Anthropic's protocol."""

READING = errors(*_READING)
"""Of endpoints that read a body."""


NAMED_EVENTS: Responses = {
    200: {
        "description": "At once as JSON, or with `stream` in events that say what they are.",
        "content": {
            "text/event-stream": {
                "schema": {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
            }
        },
    }
}
"""Of endpoints of the newer protocols."""


def stream_of(chunk: type[BaseModel]) -> Responses:
    """The answers of an endpoint that may send them in pieces, each of which is a `chunk`, one of CHUNKS."""
    piece = {"anyOf": [{"$ref": _REFERENCE.format(model=one.__name__)} for one in (chunk, ErrorResponse)]}
    data = {
        "type": "string",
        "anyOf": [{"const": "[DONE]"}, {"contentMediaType": "application/json", "contentSchema": piece}],
    }
    event = {"type": "object", "properties": {"data": data}, "required": ["data"]}
    return {
        200: {
            "description": "At once as JSON, or with `stream` in pieces, of which the last one is [DONE].",
            "content": {"text/event-stream": {"schema": event}},
        }
    }


def describe(app: FastAPI, *, names: Sequence[str], needs_key: bool) -> None:
    """Completes the document that `app` gives out: `names` are the model's, none if these may change."""
    made = app.openapi  # which keeps the document that it has made once
    completed: list[dict[str, Any]] = []

    def complete() -> dict[str, Any]:
        if not completed:
            document = made()
            _add_chunks(document)
            if names:
                _name_the_model(document, list(names))
            _add_what_stands_around(document, needs_key=needs_key)
            completed.append(document)
        return completed[0]

    app.openapi = complete  # type: ignore[method-assign]  # as FastAPI's documentation has it


def _add_chunks(document: dict[str, Any]) -> None:
    """Adds what no endpoint returns as a model."""
    schemas = document["components"]["schemas"]
    for chunk in CHUNKS:
        schema = chunk.model_json_schema(ref_template=_REFERENCE, mode="serialization")
        schemas.update(schema.pop("$defs", {}))
        schemas[chunk.__name__] = schema


def _operations(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for operation in methods.values():
            yield path, operation


def _name_the_model(document: dict[str, Any], names: list[str]) -> None:
    schemas = document["components"]["schemas"]
    found = [schema["properties"]["model"] for name, schema in schemas.items() if name.endswith("Request")
             and "model" in schema["properties"]]  # fmt: skip
    found += [one["schema"] for _, operation in _operations(document) for one in operation.get("parameters", ())
              if one["name"] == "model"]  # fmt: skip
    for schema in found:
        for choice in schema.get("anyOf", [schema]):
            if choice["type"] == "string":
                choice["enum"] = names


def _add_what_stands_around(document: dict[str, Any], *, needs_key: bool) -> None:
    for unused in ("HTTPValidationError", "ValidationError"):
        document["components"]["schemas"].pop(unused)
    if needs_key:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operation in _operations(document):
        answers = operation["responses"]
        answers.pop("422", None)  # FastAPI's, which are errors of status 400 here
        if needs_key and path not in OPEN_PATHS:
            operation["security"] = [{"key": []}]
            model = AnthropicErrorResponse if is_anthropics(path) else ErrorResponse
            content = {"application/json": {"schema": {"$ref": _REFERENCE.format(model=model.__name__)}}}
            answers["401"] = {"description": _REASONS[401], "content": content}
        for status, answer in answers.items():
            answer["headers"] = {"x-request-id": _REQUEST_ID, **_HEADERS.get(status, {})}
