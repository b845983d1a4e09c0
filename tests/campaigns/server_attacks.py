"""What hostile and broken clients do to a server, drawn at random; each attack says what it found wrong."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

PATIENCE = 120.0
"""Seconds without an answer, which is far beyond all limits of the server."""

_GIANT_NBYTES = 20 * 2**20
"""Over the server's limit of 16 MiB."""

_PIECE = b"x" * 2**16
_FINE = range(200, 300)
_TO_BLAME = range(400, 500)
_UNKNOWN_ENCODING = 501


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where attacks go: an address, and the name of the model there."""

    host: str
    port: int
    model: str

    @contextlib.asynccontextmanager
    async def connect(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """A connection, which is reset at the end if it is open still."""
        reader, writer = await asyncio.open_connection(self.host, self.port)
        try:
            yield reader, writer
        finally:
            writer.transport.abort()

    def request(self, body: bytes, *, path: str = "/v1/completions", length: int | None = None) -> bytes:
        """A whole request."""
        size = len(body) if length is None else length
        return (
            f"POST {path} HTTP/1.1\r\nHost: {self.host}\r\nContent-Type: application/json\r\nContent-Length: {size}\r\n"
            "Connection: close\r\n\r\n"
        ).encode() + body

    def generation(self, rng: random.Random) -> bytes:
        """A request that takes a while."""
        chat = rng.random() < 0.5
        content = {"messages": [{"role": "user", "content": "Hello"}]} if chat else {"prompt": "Hello"}
        body = {
            "model": self.model,
            "max_tokens": 200,
            "ignore_eos": True,
            "n": rng.choice((1, 1, 3)),
            "stream": rng.random() < 0.7,
            **content,
        }
        return self.request(json.dumps(body).encode(), path="/v1/chat/completions" if chat else "/v1/completions")


Attack = Callable[[Target, random.Random, int], Awaitable[str | None]]


async def disconnect(target: Target, rng: random.Random, _: int) -> str | None:
    """Goes at any point: within the head or the body, before the first token, or in the middle of the answer."""
    request = target.generation(rng)
    async with target.connect() as (reader, writer):
        if rng.random() < 0.4:
            writer.write(request[: rng.randrange(len(request))])
        else:
            writer.write(request)
            if rng.random() < 0.5:
                await asyncio.sleep(rng.random() * 0.05)
            else:
                with contextlib.suppress(asyncio.IncompleteReadError):  # a short answer may be over before
                    await _in_time(reader.readexactly(rng.randrange(1, 20_000)))
        if rng.random() < 0.5:
            writer.close()  # politely
            await asyncio.sleep(rng.random() * 0.05)
    return None


async def malformed(target: Target, rng: random.Random, _: int) -> str | None:
    """Sends a request with some bytes changed, taken out or put in."""
    whole = target.request(
        json.dumps({"model": target.model, "prompt": "Hello", "max_tokens": 2, "temperature": 0}).encode()
    )
    broken = mutated(whole, rng)
    async with target.connect() as (reader, writer):
        writer.write(broken)
        writer.write_eof()  # what is missing of a body does not come
        return judge(await _answer(reader), broken=broken)


def mutated(whole: bytes, rng: random.Random) -> bytes:
    """`whole` with some bytes changed, taken out or put in."""
    broken = bytearray(whole)
    for _ in range(rng.choice((1, 1, 2, 5, 50))):
        at = rng.randrange(len(broken))
        match rng.randrange(4):
            case 0:
                broken[at] = rng.randrange(256)
            case 1:
                del broken[at : at + rng.randrange(1, 20)]
            case 2:
                broken[at:at] = rng.randbytes(rng.randrange(1, 20))
            case _:
                broken[at:at] = rng.choice((b"\r\n", b"\x00", b"{", b"\xff", b"9" * 50, b'"', b"["))
        if not broken:
            broken += b"\x00"
    return bytes(broken)


def judge(answer: bytes, *, broken: bytes) -> str | None:
    """The bytes may make two requests or more; no answer is fine, too, where the end of a request is missing."""
    while answer:
        head, _, rest = answer.partition(b"\r\n\r\n")
        status = int(head.split(b" ", 2)[1])
        if status in _FINE:
            return None
        if status not in (*_TO_BLAME, _UNKNOWN_ENCODING):
            return f"the status {status} for {broken!r}"
        body, end = json.JSONDecoder().raw_decode(rest.decode("ascii"))
        if list(body) != ["error"]:
            return f"the answer {body} for {broken!r}"
        answer = rest[end:]
    return None


async def giant(target: Target, rng: random.Random, _: int) -> str | None:
    """Sends more than the server takes, with its length or without."""
    chunked = rng.random() < 0.5
    head = target.request(b"", length=_GIANT_NBYTES)
    if chunked:
        head = head.replace(b"Content-Length: %d" % _GIANT_NBYTES, b"Transfer-Encoding: chunked")
    piece = b"%x\r\n%s\r\n" % (len(_PIECE), _PIECE) if chunked else _PIECE
    async with target.connect() as (reader, writer):
        writer.write(head)
        answer = asyncio.create_task(_answer(reader))
        with contextlib.suppress(ConnectionError):  # the server closes once it has answered
            for _ in range(_GIANT_NBYTES // len(_PIECE)):
                if answer.done():
                    break
                writer.write(piece)
                await writer.drain()
        found = await answer
    return None if found.startswith(b"HTTP/1.1 413 ") else f"{found[:100]!r} for a giant body"


async def slow(target: Target, rng: random.Random, number: int) -> str | None:
    """Sends a byte now and then, of a head or (a hundredth) of a body, or none at all."""
    head, _, body = target.generation(rng).partition(b"\r\n\r\n")
    async with target.connect() as (reader, writer):
        answer = asyncio.create_task(_answer(reader))
        if number % 100 == 99:
            writer.write(head + b"\r\n\r\n")
            to_send, expected = body, b"HTTP/1.1 408 "
        elif number % 5 == 0:
            to_send, expected = b"", b""
        else:
            to_send, expected = head, b"HTTP/1.1 408 "
        with contextlib.suppress(ConnectionError):
            for byte in to_send[:-1]:
                writer.write(bytes([byte]))
                if (await asyncio.wait([answer], timeout=0.5 + rng.random()))[0]:
                    break
        found = await answer
    right = found.startswith(expected) if expected else not found
    return None if right else f"{found[:100]!r} for a slow client, expected {expected!r}"


async def _answer(reader: asyncio.StreamReader) -> bytes:
    """What comes until the connection is closed, or reset."""
    answer = b""
    with contextlib.suppress(ConnectionError):
        while piece := await _in_time(reader.read(2**16)):
            answer += piece
    return answer


async def _in_time(work: Awaitable[bytes]) -> bytes:
    async with asyncio.timeout(PATIENCE):
        return await work
