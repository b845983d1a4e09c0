"""What happens around every request: its id, failures, API keys, and limits of its body."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import uuid
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from furiosa_llm.server import page
from furiosa_llm.server.errors import INTERNAL_ERROR, ApiError, error_response

logger = logging.getLogger(__name__)

_OPEN_PATHS = frozenset({"/health", "/version", "/metrics", "/openapi.json"}) | page.OPEN_PATHS
"""What needs no key: nothing there is anybody's, and those who watch over a server have none."""


class RequestIds:
    """Gives each answer an `x-request-id`, and whatever fails inside an answer in the one shape."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = uuid.uuid4().hex
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:  # whatever it is, the client gets an answer in the one shape, and the log all of it
            logger.exception("request %s: %s %s failed", request_id, scope["method"], scope["path"])
            if started:  # The client has a status already; it sees that the answer breaks off.
                raise
            await error_response(INTERNAL_ERROR)(scope, receive, send_with_id)


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
        given = _digest(key.strip().encode("latin-1"))
        # All of them are compared, so that the time does not tell which one is nearly right.
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        return scheme.lower() == "bearer" and any(matches)


class BodyLimits:
    """Refuses bodies of more than `max_nbytes` bytes, and those that take more than `timeout` seconds to arrive."""

    def __init__(self, app: ASGIApp, *, max_nbytes: int, timeout: float) -> None:
        self._app = app
        self._max_nbytes = max_nbytes
        self._timeout = timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        length = Headers(scope=scope).get("content-length", "")
        if length.isdecimal() and int(length[:20]) > self._max_nbytes:
            await error_response(self._too_large())(scope, receive, send)
            return
        await self._app(scope, self._limited(receive), send)

    def _limited(self, receive: Receive) -> Receive:
        count, whole = 0, False
        deadline = asyncio.get_running_loop().time() + self._timeout

        async def receive_limited() -> Message:
            nonlocal count, whole
            if whole:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise ApiError(
                    408, f"the body did not arrive within {self._timeout:g} s", headers={"Connection": "close"}
                ) from None
            count += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if count > self._max_nbytes:
                raise self._too_large()
            return message

        return receive_limited

    def _too_large(self) -> ApiError:
        # What the client is still sending is not read, hence no other request can follow on the connection.
        message = f"the body is larger than the {self._max_nbytes} bytes that are taken; send less"
        return ApiError(413, message, headers={"Connection": "close"})


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
