"""Bodies that clients compress: `Content-Encoding: gzip` and `deflate`, never more than the limit of what they say."""

from __future__ import annotations

import asyncio
import zlib

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from furiosa_llm.server.errors import ApiError, error_response

_WINDOW_BITS = {"gzip": 31, "x-gzip": 31, "deflate": 15}
"""What zlib calls these encodings."""
_PIECE = 2**20
"""Bytes that are decompressed at a time."""


class ContentEncodings:
    """Decompresses bodies, of at most `max_nbytes` bytes then; refuses encodings that it does not know."""

    def __init__(self, app: ASGIApp, *, max_nbytes: int) -> None:
        self._app = app
        self._max_nbytes = max_nbytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles a request."""
        encoding = Headers(scope=scope).get("content-encoding", "") if scope["type"] == "http" else ""
        encoding = encoding.strip().lower()
        if encoding in ("", "identity"):
            await self._app(scope, receive, send)
        elif encoding in _WINDOW_BITS:
            plain = [pair for pair in scope["headers"] if pair[0] not in (b"content-encoding", b"content-length")]
            body = _Compressed(receive, encoding, self._max_nbytes)
            await self._app({**scope, "headers": plain}, body.receive, send)
        else:
            message = f"found the Content-Encoding {encoding[:100]!r}, expected gzip, deflate or none"
            error = ApiError(415, message, headers={"Accept-Encoding": "gzip, deflate"})
            await error_response(error)(scope, receive, send)


class _Compressed:
    """One compressed body, as it comes."""

    def __init__(self, receive: Receive, encoding: str, max_nbytes: int) -> None:
        self._receive = receive
        self._encoding = encoding
        self._max_nbytes = max_nbytes
        self._decompressor = zlib.decompressobj(_WINDOW_BITS[encoding])
        self._held = b""
        self._count = 0
        self._more = True
        """Whether the client sends more."""

    async def receive(self) -> Message:
        """The next piece of what it says."""
        if not self._more and not self._held:
            return await self._receive()
        if not self._held:
            message = await self._receive()
            if message["type"] != "http.request":
                return message
            self._held, self._more = message.get("body", b""), message.get("more_body", False)
        try:
            # On another thread: an answer's tokens go out meanwhile.
            piece = await asyncio.to_thread(self._decompressor.decompress, self._held, _PIECE)
        except zlib.error as error:
            raise self._invalid(str(error)) from error
        self._held = self._decompressor.unconsumed_tail
        self._count += len(piece)
        if self._count > self._max_nbytes:
            raise ApiError(413, f"the body says more than the {self._max_nbytes} bytes that are taken; send less")
        self._check_end()
        return {"type": "http.request", "body": piece, "more_body": self._more or bool(self._held)}

    def _check_end(self) -> None:
        if self._decompressor.unused_data:
            raise self._invalid("something follows its end")
        if not self._more and not self._held and not self._decompressor.eof:
            raise self._invalid("its end is missing")

    def _invalid(self, reason: str) -> ApiError:
        return ApiError(400, f"the body is not valid {self._encoding}: {reason}")
