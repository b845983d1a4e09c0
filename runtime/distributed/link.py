"""The sockets between hosts: who may connect, what a frame may hold, and how soon a host that is gone is noticed.

ZeroMQ's own handshake carries the token, so that whoever has it not is refused before a message of theirs is read; its
heartbeats notice a cable that is cut while nothing is under way. Nothing is encrypted.
"""

from __future__ import annotations

import contextlib
import hmac
import socket as sockets
import threading
from collections.abc import Sequence

import zmq
from zmq.utils.monitor import parse_monitor_message

from furiosa_llm.runtime.distributed.wire import MAX_FRAME_NBYTES, MAX_FRAMES
from furiosa_llm.runtime.errors import UnsupportedError, WireError

Context = zmq.Context[zmq.Socket[bytes]]
Socket = zmq.Socket[bytes]

_HEARTBEAT_MS = 500
_TIMEOUT_MS = 2000
"""A host from which nothing has come for so long after a heartbeat is lost: 2.5 seconds after the last at most."""
_HANDSHAKE_MS = 5000
_USER = b"furiosa-llm"
_ZAP = "inproc://zeromq.zap.01"
LEAST_TOKEN = 16
"""The fewest characters of a token."""


def check_token(token: str) -> bytes:
    """`token` as it goes over the wire; raises UnsupportedError if it is too short or too long for a handshake."""
    encoded = token.encode()
    if not LEAST_TOKEN <= len(encoded) <= 255:
        raise UnsupportedError(f"a token of {len(encoded)} bytes; give one of {LEAST_TOKEN} to 255")
    return encoded


class Doorkeeper:
    """Lets those into the servers of a `context` that have the `token`, on a thread of its own."""

    def __init__(self, context: Context, token: str) -> None:
        self._token = check_token(token)
        self._socket = context.socket(zmq.REP)
        self._socket.bind(_ZAP)
        self._thread = threading.Thread(target=self._serve, name="furiosa-doorkeeper", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        """Answers until the context is destroyed."""
        with contextlib.suppress(zmq.ZMQError):
            while True:
                version, request, _, _, _, mechanism, *credentials = self._socket.recv_multipart()
                known = mechanism == b"PLAIN" and len(credentials) == 2 and credentials[0] == _USER
                known &= hmac.compare_digest(credentials[-1] if credentials else b"", self._token)
                status = [b"200", b"OK"] if known else [b"400", b"the token is another one"]
                self._socket.send_multipart([version, request, *status, b"", b""])
        self._socket.close(linger=0)


def listen(context: Context, address: str) -> Socket:
    """A socket that takes messages at `address`, such as tcp://10.77.0.2:0, from whom the doorkeeper lets in."""
    socket = context.socket(zmq.ROUTER)
    socket.plain_server = True
    socket.router_mandatory = True
    _configure(socket)
    try:
        socket.bind(address)
    except zmq.ZMQError:
        socket.close()
        raise
    return socket


def receive(socket: Socket) -> list[memoryview]:
    """The frames of the next message; of one that has too many, raises WireError and keeps none.

    Waits for it as long as the socket's `rcvtimeo` says, then raises zmq.Again: without a poll before, which costs more
    than the message does.
    """
    frames: list[memoryview] = []
    more, count = True, 0
    while more:
        frame = socket.recv(copy=False)
        more, count = frame.more, count + 1
        if count <= MAX_FRAMES + 2:
            frames.append(frame.buffer)
        else:
            frames.clear()
    if count > MAX_FRAMES + 2:
        raise WireError(f"a message of {count} frames, expected at most {MAX_FRAMES}")
    return frames


def unreachable(address: tuple[str, int], seconds: float) -> str | None:
    """Why nothing takes connections at `address` within so long; None if something does."""
    try:
        sockets.create_connection(address, timeout=seconds).close()
    except OSError as error:
        return str(error)
    return None


def split_address(address: str) -> tuple[str, int]:
    """The parts of HOST:PORT; raises UnsupportedError for what is none, such as ray://10.0.0.1:10001."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal() or int(port) > 65535:
        raise UnsupportedError(f"{address!r:.80} is no address; give HOST:PORT, such as 10.0.0.1:6379")
    return host.strip("[]"), int(port)


class Link:
    """A connection to the server at `address`, which `what` names; `lost` says why it is of no use any more."""

    def __init__(self, context: Context, address: str, token: str, what: str) -> None:
        self.what = what
        self.connected = False
        self.lost: str | None = None
        self.socket = context.socket(zmq.DEALER)
        self.socket.plain_username = _USER
        self.socket.plain_password = check_token(token)
        _configure(self.socket)
        events = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_FAILED_AUTH
        self.monitor = self.socket.get_monitor_socket(events)
        self.socket.connect(address)

    def notice(self) -> str | None:
        """Takes what has happened to the connection; `lost`."""
        while self.monitor.poll(0):
            event = parse_monitor_message(self.monitor.recv_multipart())["event"]
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self.connected = True
            elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                self.lost = f"{self.what} refuses the token: it was started with another one"
            elif self.connected and self.lost is None:
                self.lost = f"{self.what} is lost: its process or its host has ended, or the network between"
        return self.lost

    def send(self, frames: Sequence[bytes | memoryview]) -> None:
        """Sends a message; if the connection is not there, it is dropped, and `lost` will say so."""
        with contextlib.suppress(zmq.Again):
            self.socket.send_multipart(frames, flags=zmq.NOBLOCK)

    def close(self, *, linger_ms: int = 0) -> None:
        """Closes it, when what was sent is gone or so long later."""
        self.socket.disable_monitor()
        self.monitor.close(linger=0)
        self.socket.close(linger=linger_ms)


def _configure(socket: Socket) -> None:
    socket.linger = 0
    socket.maxmsgsize = MAX_FRAME_NBYTES
    socket.sndhwm = socket.rcvhwm = 1024
    socket.handshake_ivl = _HANDSHAKE_MS
    socket.heartbeat_ivl = _HEARTBEAT_MS
    socket.heartbeat_timeout = _TIMEOUT_MS
    socket.heartbeat_ttl = _TIMEOUT_MS
