"""SHA-256 of a stream of bytes, computed in separate threads: several digests of the same bytes at once."""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

_QUEUE_LENGTH = 32
"""How many pieces may wait for a hashing thread."""


class Hasher:
    """Computes digests, in a thread of its own if `threaded`."""

    def __init__(self, *, threaded: bool) -> None:
        self._queue: queue.Queue[Callable[[], None] | None] | None = None
        if threaded:
            self._queue = queue.Queue(_QUEUE_LENGTH)
            self._thread = threading.Thread(target=self._work, name="hash-weights", daemon=True)
            self._thread.start()

    def __enter__(self) -> Hasher:
        return self

    def __exit__(self, *_: object) -> None:
        if self._queue is not None:
            self._queue.put(None)
            self._thread.join()

    def digest(self) -> Digest:
        """A digest of bytes to come."""
        return Digest(self)

    def run(self, work: Callable[[], None]) -> None:
        """Do `work` now, or, if threaded, after all work submitted before."""
        if self._queue is None:
            work()
        else:
            self._queue.put(work)

    def _work(self) -> None:
        assert self._queue is not None
        while (work := self._queue.get()) is not None:
            work()
            del work


class Digest:
    """One SHA-256, computed by a hasher."""

    def __init__(self, hasher: Hasher) -> None:
        self._hasher = hasher
        self._sha256 = hashlib.sha256()

    def update(self, piece: npt.NDArray[np.uint8]) -> None:
        """Append bytes to the hashed stream; they must not change before the digest is asked for."""
        self._hasher.run(lambda: self._sha256.update(piece.data))

    def hexdigest(self) -> str:
        """The digest of all bytes so far; waits until it is computed."""
        done = threading.Event()
        self._hasher.run(done.set)
        done.wait()
        return self._sha256.hexdigest()
