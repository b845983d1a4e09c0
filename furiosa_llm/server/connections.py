"""A client's connection: uvicorn's HTTP/1.1 on h11, with limits of time and number, and errors in the usual shape."""

from __future__ import annotations

import asyncio
import socket
import struct
import sys
from typing import Any, ClassVar, cast

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol, RequestResponseCycle

from furiosa_llm.server.errors import ApiError, error_body
from furiosa_llm.server.settings import ServerSettings

_TCP_PROBES = {socket.TCP_KEEPIDLE: 60, socket.TCP_KEEPINTVL: 15, socket.TCP_KEEPCNT: 4}
"""Two minutes after a silent client's machine has gone, its connection is."""

_PARTING = 1.0
"""Seconds in which a client that was turned away may still read why."""


def connection_class(settings: ServerSettings) -> type[asyncio.Protocol]:
    """What uvicorn is to make of each connection."""

    class LimitedConnection(Connection):
        limits = settings

    return LimitedConnection


class Connection(H11Protocol):
    """uvicorn's, but a client cannot hold it without making progress, and gets an error in the usual shape.

    uvicorn gives a client all the time it likes for a request's head, for a body that nobody reads because the answer
    is out, and for taking what was written; and it answers what is no HTTP in plain text.
    """

    limits: ClassVar[ServerSettings]

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._turned_away = False
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    # uvicorn's signature, too, is narrower than the base class's.
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Takes the connection, or turns the client away."""
        super().connection_made(transport)
        # With it `pause_writing` is called for whatever the kernel does not take, which the time limit starts at.
        transport.set_write_buffer_limits(high=0)
        self._probe_silent_clients(transport.get_extra_info("socket"))
        if self._is_one_too_many():
            self._turn_away()
        else:
            self._head_timer = self.loop.call_later(self.limits.head_timeout, self._head_is_late)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops the clocks."""
        self._stop_head_timer()
        self._stop_write_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Takes what the client sent; the clock runs as long as that is not a request that is being answered."""
        if self._turned_away:
            return
        super().data_received(data)
        if self._is_answering():
            self._stop_head_timer()
        elif self._head_timer is None and not self.transport.is_closing():
            self._head_timer = self.loop.call_later(self.limits.head_timeout, self._head_is_late)

    def pause_writing(self) -> None:
        """The client does not take what it is sent: from now on it has a time limit."""
        super().pause_writing()
        self._check_writing(None)

    def resume_writing(self) -> None:
        """The client has taken all of it."""
        super().resume_writing()
        self._stop_write_timer()

    def send_400_response(self, msg: str) -> None:
        """Answers what is no HTTP; h11 knows a better status where there is one."""
        found = sys.exception()
        status = found.error_status_hint if isinstance(found, h11.RemoteProtocolError) else 400
        self._refuse(ApiError(status, f"the request is not valid HTTP: {str(found or msg)[:200]}"))

    def _unsupported_upgrade_warning(self) -> None:
        """Two lines of the log for each request that asks for a WebSocket, and is answered as if it did not."""

    def _is_answering(self) -> bool:
        cycle: RequestResponseCycle | None = self.cycle  # which uvicorn calls never None, and begins with
        return cycle is not None and not cycle.response_complete

    def _is_one_too_many(self) -> bool:
        limit = self.limits.max_connections
        if len(self.connections) <= limit:
            return False
        # Clients that were turned away are there until they have read why, and take nobody's place.
        return sum(not cast(Connection, one)._turned_away for one in self.connections) > limit

    def _turn_away(self) -> None:
        self._turned_away = True
        limit = self.limits.max_connections
        error = ApiError(
            503,
            f"{limit} connections are open, which is the limit; try again later",
            code="too_many_connections",
            headers={"Retry-After": "1"},
        )
        self.transport.write(_answer(error))
        # Closed at once, the client would be reset while it still sends, and might never read the answer.
        self.transport.write_eof()
        self._head_timer = self.loop.call_later(_PARTING, self.transport.abort)

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self.conn.trailing_data[0] and self.conn.their_state is h11.IDLE:
            seconds = self.limits.head_timeout
            self._refuse(ApiError(408, f"the head of the request did not arrive within {seconds:g} s"))
        else:
            self.transport.close()

    def _refuse(self, error: ApiError) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.write(_answer(error))
        self.transport.close()

    def _check_writing(self, left_before: int | None) -> None:
        left = self.transport.get_write_buffer_size()
        if left_before is not None and left >= left_before:
            self._reset()
            return
        self._write_timer = self.loop.call_later(self.limits.send_timeout, self._check_writing, left)

    def _reset(self) -> None:
        # Without this the kernel would keep what it has of the answer, and offer it for minutes.
        no_lingering = struct.pack("ii", 1, 0)
        self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, no_lingering)
        self.transport.abort()

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _probe_silent_clients(self, connection: socket.socket) -> None:
        """Lets the kernel find out that a client's machine has gone, which nothing else shows."""
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _TCP_PROBES.items():
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
        # Later than our own clock, which tells the client.
        unacknowledged = round((self.limits.send_timeout + _PARTING) * 1000)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, unacknowledged)


def _answer(error: ApiError) -> bytes:
    """The whole answer: h11 does not write one to what it could not read."""
    body = error_body(error)
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",
        **cast(dict[str, str], error.headers or {}),
    }
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    status = f"HTTP/1.1 {error.status_code} {STATUS_PHRASES[error.status_code].decode()}\r\n"
    return f"{status}{lines}\r\n".encode() + body
