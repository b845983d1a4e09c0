"""The driver threads: each steps a fixed run of ranks, and they meet at barriers.

The calling thread is driver 0, so that one thread needs no hand-over at all. A thread that fails lets its peers out of
every barrier they wait at, so a failure ends the run on all of them and none hangs.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from queue import SimpleQueue

from furiosa_llm.runtime.errors import ExecutionError


class PeerFailedError(Exception):
    """Another driver thread has failed; its error is the one to show."""


class Barrier:
    """A barrier between `count` threads made of token queues, one for each ordered pair of threads.

    This took 9 us for two threads where threading.Barrier took 16. A thread that is one barrier ahead leaves its token
    in the queue, so tokens of successive barriers cannot be confused.
    """

    __slots__ = ("_inbox", "_outbox")

    def __init__(self, count: int) -> None:
        queues: dict[tuple[int, int], SimpleQueue[bool]] = {
            (sender, receiver): SimpleQueue()
            for sender in range(count)
            for receiver in range(count)
            if sender != receiver
        }
        self._inbox = [[queues[s, r] for s in range(count) if s != r] for r in range(count)]
        self._outbox = [[queues[s, r] for r in range(count) if r != s] for s in range(count)]

    def wait(self, thread: int) -> None:
        """Returns when every thread has called this as often as `thread` has; raises PeerFailedError if one failed."""
        for queue in self._outbox[thread]:
            queue.put(True)
        for queue in self._inbox[thread]:
            if not queue.get():
                raise PeerFailedError

    def leave(self, thread: int) -> None:
        """Says that `thread` will not come to any further barrier: whoever waits for it fails."""
        for queue in self._outbox[thread]:
            queue.put(False)


class Drivers:
    """`count` threads that run one function together; thread 0 is whichever thread calls `run`."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._barrier = Barrier(count)
        self._closed = False
        self._pool = ThreadPoolExecutor(count - 1, thread_name_prefix="furiosa-driver") if count > 1 else None

    def run(self, body: Callable[[int, Barrier], None]) -> None:
        """Calls `body(thread, barrier)` on every thread and returns when all have.

        An exception on any thread ends the others at their next barrier and is raised here.
        """
        if self._closed:
            raise ExecutionError("the executor is closed; load the artifact again")
        if self._pool is None:
            body(0, self._barrier)
            return
        barrier = self._barrier
        futures = [self._pool.submit(self._guarded, body, thread, barrier) for thread in range(1, self.count)]
        try:
            self._guarded(body, 0, barrier)
        except PeerFailedError:
            self._raise_first(futures)
            raise
        finally:
            wait(futures)
        self._raise_first(futures)

    def close(self) -> None:
        """Ends the threads; further runs raise ExecutionError."""
        self._closed = True
        if self._pool is not None:
            self._pool.shutdown()

    def _guarded(self, body: Callable[[int, Barrier], None], thread: int, barrier: Barrier) -> None:
        completed = False
        try:
            body(thread, barrier)
            completed = True
        finally:
            if not completed:
                # A new barrier for the next run: this one's queues keep tokens that nobody will take.
                self._barrier = Barrier(self.count)
                barrier.leave(thread)

    @staticmethod
    def _raise_first(futures: list[Future[None]]) -> None:
        wait(futures)
        errors = [error for error in (future.exception() for future in futures) if error is not None]
        for error in errors:
            if not isinstance(error, PeerFailedError):
                raise error


def thread_of(rank: int, ranks: int, threads: int) -> int:
    """The driver thread that steps `rank`: contiguous runs of ranks, as equal as can be."""
    return rank * threads // ranks


def ranks_of(thread: int, ranks: int, threads: int) -> tuple[int, ...]:
    """The ranks that driver `thread` steps, ascending."""
    return tuple(rank for rank in range(ranks) if thread_of(rank, ranks, threads) == thread)
