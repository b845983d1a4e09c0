"""Answers in pieces (server-sent events), and noticing that the client has gone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"


class ClientGoneError(Exception):
    """The client has closed its connection, or takes nothing any more."""


def event(data: Any) -> bytes:
    """One event."""
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T], *signs: Coroutine[Any, Any, None]) -> T:
    """What `work` gives; it is cancelled, and ClientGoneError raised, if the client goes before.

    The request's body has to be read already. `signs` are what else returns if there is nobody to work for.
    """
    working = asyncio.create_task(work)
    tasks: list[asyncio.Task[Any]] = [working]
    tasks += (asyncio.create_task(sign) for sign in (_disconnected(receive), *signs))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError
        return working.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class EventStream(Response):
    """An answer of `events`, which is closed when they end or the client goes, whatever comes first.

    A client that takes nothing for `send_timeout` seconds, or up to twice as many, counts as gone.
    """

    media_type = "text/event-stream"
    charset = "utf-8"

    def __init__(self, events: AsyncGenerator[bytes, None], *, send_timeout: float) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._send_timeout = send_timeout
        self._sending_since: float | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - as ASGI calls it
        """Sends the events; returns silently if the client goes."""
        async with aclosing(self._events):
            try:
                await until_disconnect(receive, self._send(send), self._stalled())
            except ClientGoneError:
                return

    async def _send(self, send: Send) -> None:
        loop = asyncio.get_running_loop()
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for data in self._events:
            if not data:
                continue
            self._sending_since = loop.time()
            await send({"type": "http.response.body", "body": data, "more_body": True})
            self._sending_since = None
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _stalled(self) -> None:
        """Returns when a piece has been on its way for too long; a timer for each piece would cost more than it."""
        loop = asyncio.get_running_loop()
        while self._sending_since is None or loop.time() - self._sending_since < self._send_timeout:
            await asyncio.sleep(self._send_timeout)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
