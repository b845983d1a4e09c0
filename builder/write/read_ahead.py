"""Read the sources of stored tensors in order, ahead of the writer and within a bound on memory."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import queue
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from furiosa_llm.builder.source.tensors import STREAMED_NBYTES, SourceTensor, read_packed, read_pieces
from furiosa_llm.builder.write.hashing import Digest, Hasher

LEAST_ROOM_NBYTES = 64 * 2**20
"""Bytes that may be in memory even if the largest tensor is smaller."""

PIECES_NBYTES = 16 * 2**20
"""Bytes of a tensor read in pieces that may wait to be written."""

Bytes = npt.NDArray[np.uint8]


@dataclasses.dataclass(frozen=True, slots=True)
class ReadTensor:
    """All bytes of a source as ONNX packs them, and their digest, which may still be being computed."""

    data: Bytes
    digest: Digest


class SourceReader:
    """Gives sources one after the other, in the order in which they were announced.

    The bytes in memory at any time are those that were read but not yet taken, and those of the tensor given last. They
    are at most the bytes of the largest tensor that is read whole, or `LEAST_ROOM_NBYTES`, plus `PIECES_NBYTES` for
    tensors read in pieces.
    """

    def __init__(
        self, sources: Sequence[ir.TensorProtocol], streamed: Sequence[bool], hasher: Hasher, *, ahead: bool
    ) -> None:
        """`streamed` says which sources are wanted in pieces; `ahead` reads them in a thread of its own."""
        self._hasher = hasher
        self._plan = list(zip(sources, streamed, strict=True))
        whole = [source.nbytes for source, pieces in self._plan if not pieces]
        self._room = _Room(max([LEAST_ROOM_NBYTES, *whole]))
        self._piece_room = _Room(PIECES_NBYTES)
        self._items: Iterator[Bytes | ReadTensor] = self._read()
        self._taken: tuple[_Room, int] | None = None
        self._queue: queue.SimpleQueue[Bytes | ReadTensor | None] = queue.SimpleQueue()
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "read-weights") if ahead else None
        self._work: concurrent.futures.Future[None] | None = None

    def __enter__(self) -> SourceReader:
        if self._pool is not None:
            self._work = self._pool.submit(self._read_ahead)
        return self

    def __exit__(self, *_: object) -> None:
        self._room.close()
        self._piece_room.close()
        if self._pool is not None:
            self._pool.shutdown()

    def whole(self) -> ReadTensor:
        """The next source, which is not streamed. Raises ModelLoadError if it cannot be read."""
        found = self._next()
        assert isinstance(found, ReadTensor)
        return found

    def pieces(self, nbytes: int) -> Iterator[Bytes]:
        """The next source, which is streamed and has `nbytes`, piece by piece; raises as `whole` does."""
        while nbytes:
            found = self._next()
            assert not isinstance(found, ReadTensor)
            nbytes -= len(found)
            yield found

    def _next(self) -> Bytes | ReadTensor:
        if self._taken is not None:
            room, nbytes = self._taken
            room.release(nbytes)
            self._taken = None
        if self._work is None:
            found = next(self._items)
        elif (queued := self._queue.get()) is not None:
            found = queued
        else:
            self._work.result()
            raise AssertionError("more was asked for than was announced")
        self._taken = (
            (self._room, found.data.nbytes) if isinstance(found, ReadTensor) else (self._piece_room, len(found))
        )
        return found

    def _read_ahead(self) -> None:
        try:
            for item in self._items:
                self._queue.put(item)
                del item  # it would stay in memory until the next one is read
        finally:
            self._queue.put(None)

    def _read(self) -> Iterator[Bytes | ReadTensor]:
        for source, streamed in self._plan:
            if streamed:
                assert isinstance(source, SourceTensor)
                rest = source.nbytes
                pieces = read_pieces(source)
                while rest and self._piece_room.take(min(rest, STREAMED_NBYTES)):
                    piece = next(pieces)
                    rest -= len(piece)
                    yield piece
                    del piece
            elif self._room.take(source.nbytes):
                yield self._read_whole(source)
            if self._room.closed:
                return

    def _read_whole(self, source: ir.TensorProtocol) -> ReadTensor:
        digest = self._hasher.digest()
        return ReadTensor(read_packed(source, digest.update), digest)


class _Room:
    """Bytes that may be in memory at once."""

    def __init__(self, nbytes: int) -> None:
        self._free = nbytes
        self._changed = threading.Condition()
        self.closed = False

    def take(self, nbytes: int) -> bool:
        """Wait until `nbytes` fit; False if the room was closed."""
        with self._changed:
            self._changed.wait_for(lambda: self.closed or self._free >= nbytes)
            self._free -= nbytes
            return not self.closed

    def release(self, nbytes: int) -> None:
        """Give room back."""
        with self._changed:
            self._free += nbytes
            self._changed.notify_all()

    def close(self) -> None:
        """End all waiting, now and later."""
        with self._changed:
            self.closed = True
            self._changed.notify_all()
