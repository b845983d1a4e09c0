"""Answers in pieces (server-sent events), and noticing that the client has gone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from contextvars import ContextVar
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from furiosa_llm.runtime.artifact.errors import FuriosaLLMError
from furiosa_llm.server.errors import ApiError, api_error, error_event

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"


_GONE: ContextVar[list[bool]] = ContextVar("gone")
"""Of the request that is handled: whether its client has gone. One list for all of its tasks."""


def begin_request() -> None:
    """The request of this task has begun, and its client is there."""
    _GONE.set([False])


def client_is_gone() -> bool:
    """Whether the request of this task is given up because its client has gone."""
    return _GONE.get([False])[0]


class ClientGoneError(Exception):
    """The client has closed its connection, or takes nothing any more."""


def event(data: Any) -> bytes:
    """One event."""
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def named_event(name: str, data: Any) -> bytes:
    """One event that says what it is."""
    return f"event: {name}\n".encode() + event(data)


def json_answer(data: Any) -> Response:
    """An answer at once."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return Response(text.encode(), media_type="application/json")


async def events_of(
    outputs: AsyncGenerator[T, None],
    first: T,
    chunks: Callable[[T], bytes],
    last: Callable[[], bytes],
    *,
    end: bytes = DONE,
    failed: Callable[[ApiError], bytes] = error_event,
) -> AsyncGenerator[bytes, None]:
    """The `chunks` of each output, then what is `last`, and the `end`.

    What fails now has its place among them, as the last one, in the shape that `failed` gives it.
    """
    async with aclosing(outputs):
        try:
            yield chunks(first)
            async for output in outputs:
                yield chunks(output)
        except (FuriosaLLMError, ApiError) as error:
            yield failed(api_error(error))
            return
    yield last() + end


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What `work` gives; it is cancelled, and ClientGoneError raised, if the client goes before.

    The request's body has to be read already.
    """
    working = asyncio.create_task(work)
    tasks: list[asyncio.Task[Any]] = [working, asyncio.create_task(_disconnected(receive))]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            _GONE.get([False])[0] = True
            raise ClientGoneError
        return working.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class EventStream(Response):
    """An answer of `events`, which is closed when they end or the client goes, whatever comes first."""

    media_type = "text/event-stream"
    charset = "utf-8"

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - as ASGI calls it
        """Sends the events; returns silently if the client goes."""
        async with aclosing(self._events):
            try:
                await until_disconnect(receive, self._send(send))
            except ClientGoneError:
                return

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for data in self._events:
            if data:
                await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
