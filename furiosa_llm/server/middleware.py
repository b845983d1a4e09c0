"""What happens around every request: its id, failures, API keys, and limits of its body and its time."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import logging
import uuid
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from furiosa_llm.server import page
from furiosa_llm.server.errors import FOR_ANTHROPIC, INTERNAL_ERROR, REQUEST_ID, ApiError, error_event, error_response
from furiosa_llm.server.events import begin_request
from furiosa_llm.server.notes import NOTES, header_values, on_one_line
from furiosa_llm.server.openapi import OPEN_PATHS, is_anthropics

logger = logging.getLogger(__name__)

_OPEN_PATHS = OPEN_PATHS | page.OPEN_PATHS

_SILENCE = 1.0
"""Seconds after which a client that was answered, and does not go on with its body, has ceased to send."""


class RequestIds:
    """Gives each answer an `x-request-id` and its notes, and what fails inside an answer the shape of an error."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = uuid.uuid4().hex
        REQUEST_ID.set(request_id)
        FOR_ANTHROPIC.set(is_anthropics(scope["path"]))
        begin_request()
        notes: dict[str, list[str]] = {}
        NOTES.set(notes)
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                ids = dict.fromkeys(("x-request-id", *(("request-id",) if FOR_ANTHROPIC.get() else ())), request_id)
                MutableHeaders(scope=message).update({**ids, **header_values(notes)})
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:  # whatever it is, the client gets an answer of the usual shape, and the log all of it
            path = on_one_line(scope["path"])
            logger.exception("request %s: %s %s failed", request_id, scope["method"], path)
            if started:  # The client has a status already; it sees that the answer breaks off.
                raise
            await error_response(INTERNAL_ERROR)(scope, receive, send_with_id)


class Heads:
    """Answers HEAD wherever there is a GET, with its headers; the connection leaves out the body."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles a request."""
        is_head = scope["type"] == "http" and scope["method"] == "HEAD"
        await self._app({**scope, "method": "GET"} if is_head else scope, receive, send)


class TimeLimits:
    """Ends requests that take more than `seconds`, and requests that are still there when the server stops.

    What is not answered yet gets a status, and a stream an event with the error, after which nothing follows.
    """

    def __init__(self, app: ASGIApp, *, seconds: float | None) -> None:
        self._app = app
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = _Answer(send)
        try:
            async with asyncio.timeout(self._seconds) as limit:
                await self._app(scope, receive, answer.send)
        except TimeoutError:
            if not limit.expired():
                raise
            message = f"the request took longer than {self._seconds:g} s; ask for less, or raise --request-timeout"
            # Clients that repeat a request on a status like this one would only wait as long again.
            error = ApiError(504, message, code="request_timeout", headers={"x-should-retry": "false"})
        except asyncio.CancelledError:
            error = ApiError(503, "the server is stopping, and has cut the request; try another one", code="stopping")
        else:
            return
        await answer.cut(error, scope, receive)


class _Answer:
    """What has been sent of an answer."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._started, self._ended, self._events = False, False, False

    async def send(self, message: Message) -> None:
        """Sends on."""
        if message["type"] == "http.response.start":
            self._started = True
            self._events = Headers(raw=message["headers"]).get("content-type", "").startswith("text/event-stream")
        else:
            self._ended = not message.get("more_body", False)
        await self._send(message)

    async def cut(self, error: ApiError, scope: Scope, receive: Receive) -> None:
        """Ends the answer with `error`, if it has not ended."""
        if not self._started:
            await error_response(error)(scope, receive, self._send)
        elif not self._ended:
            # In the middle of anything else than events, only breaking off can show the error.
            last = error_event(error) if self._events else b""
            await self._send({"type": "http.response.body", "body": last, "more_body": False})


class ApiKeys:
    """Refuses requests without one of `keys`, which are compared in constant time."""

    def __init__(self, app: ASGIApp, *, keys: Sequence[str]) -> None:
        self._app = app
        self._digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles a request."""
        if scope["type"] != "http" or scope["path"] in _OPEN_PATHS or self._known(Headers(scope=scope)):
            await self._app(scope, receive, send)
            return
        error = ApiError(
            401,
            "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await error_response(error)(scope, receive, send)

    def _known(self, headers: Headers) -> bool:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if "x-api-key" in headers:  # Anthropic's clients
            scheme, key = "bearer", headers["x-api-key"]
        given = _digest(key.strip().encode("latin-1"))
        # All of them are compared, so that the time does not give away which one is nearly right.
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        return scheme.lower() == "bearer" and any(matches)


class BodyLimits:
    """Refuses bodies of more than `max_nbytes` bytes, and bodies that take more than `timeout` seconds to arrive."""

    def __init__(self, app: ASGIApp, *, max_nbytes: int, timeout: float) -> None:
        self._app = app
        self._max_nbytes = max_nbytes
        self._timeout = timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = _Body(receive, send, max_nbytes=self._max_nbytes, timeout=self._timeout)
        length = Headers(scope=scope).get("content-length", "")
        if length.isdecimal() and int(length[:20]) > self._max_nbytes:
            await error_response(body.too_large())(scope, receive, body.send)
        else:
            await self._app(scope, body.receive, body.send)


class _Body:
    """The body of one request, as it comes."""

    def __init__(self, receive: Receive, send: Send, *, max_nbytes: int, timeout: float) -> None:
        self._receive, self._send = receive, send
        self._max_nbytes = max_nbytes
        self._timeout = timeout
        self._deadline = asyncio.get_running_loop().time() + timeout
        self._count = 0
        self._whole = False

    def too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than the {self._max_nbytes} bytes that are taken; send less")

    async def receive(self) -> Message:
        """The next piece."""
        if self._whole:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._next()
        except TimeoutError:
            late = f"the body did not arrive within {self._timeout:g} s"
            raise ApiError(408, late, headers={"Connection": "close"}) from None
        self._count += len(message.get("body", b""))
        if self._count > self._max_nbytes:
            raise self.too_large()
        return message

    async def send(self, message: Message) -> None:
        """Sends on. An answer to a body that is still coming ends when the client has ceased to send.

        The end of an answer may close the connection, and a client that is reset while it still sends might never read
        the answer.
        """
        if not self._whole and message["type"] == "http.response.body" and not message.get("more_body", False):
            await self._send({**message, "more_body": True})
            await self._discard_the_rest()
            message = {"type": "http.response.body", "body": b"", "more_body": False}
        await self._send(message)

    async def _next(self) -> Message:
        message = await self._receive()
        self._whole = not message.get("more_body", False)
        return message

    async def _discard_the_rest(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(self._deadline):
                while not self._whole:
                    async with asyncio.timeout(_SILENCE):
                        await self._next()


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
