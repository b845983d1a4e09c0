"""The cores of a host as threads: each run takes some of them, which step its lanes and meet at barriers.

The thread that asks for a run takes part in it, so that one core needs no hand-over at all. A thread that fails lets
its peers out of every barrier they wait at, so a failure ends the run on all of them and none hangs.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Protocol

from furiosa_llm.runtime.artifact.options import COUNT
from furiosa_llm.runtime.errors import ExecutionError, InputError


class Waits(Protocol):
    """Where the members of a run meet."""

    def wait(self, member: int) -> None:
        """Returns when every member has called this as often as `member` has."""
        ...


Body = Callable[[Sequence[int], int, Waits], None]
"""What a thread of a run does: `body(lanes, member, barrier)`; `lanes` are the lanes that it steps, in order."""


def cores_for(threads: int | None) -> int:
    """`threads`, or if it is None one for each core that this process may use; raises InputError if below 1."""
    if threads is not None:
        COUNT.check("threads", threads, InputError)
    return threads or len(os.sched_getaffinity(0))


class PeerFailedError(Exception):
    """Another thread of the run has failed; its error is the one to show."""


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

    def wait(self, member: int) -> None:
        """Returns when every thread has called this as often as `member` has; raises PeerFailedError if one failed."""
        for queue in self._outbox[member]:
            queue.put(True)
        for queue in self._inbox[member]:
            if not queue.get():
                raise PeerFailedError

    def leave(self, member: int) -> None:
        """Says that `member` will not come to any further barrier: whoever waits for it fails."""
        for queue in self._outbox[member]:
            queue.put(False)


class _Run:
    """One run: its barrier, and the errors of its threads as they end."""

    __slots__ = ("_body", "_ended", "barrier")

    def __init__(self, body: Body, count: int) -> None:
        self._body = body
        self._ended: SimpleQueue[BaseException | None] = SimpleQueue()
        self.barrier = Barrier(count)

    def take_part(self, lanes: Sequence[int], member: int) -> None:
        """Runs the body as `member`; whatever it raises is kept for `raise_first`."""
        error: BaseException | None = None
        try:
            self._body(lanes, member, self.barrier)
        except BaseException as raised:  # noqa: BLE001 - whatever it is, `raise_first` raises it
            error = raised
            self.barrier.leave(member)
        self._ended.put(error)

    def raise_first(self, count: int) -> None:
        """Waits for all `count` threads and raises the error of one that failed by itself."""
        errors = [error for error in (self._ended.get() for _ in range(count)) if error is not None]
        for error in errors:
            if not isinstance(error, PeerFailedError):
                raise error


class Crew:
    """`count` cores, shared by all runs of a host.

    A run gets as many as its share of those who `expect` to run now; it waits if all are busy.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = threading.Condition()
        self._idle = count
        self._expecting: set[int] = set()
        self._taken: dict[int, int] = {}  # by the thread that asked for the run; without runs that were given up
        self._closed = False
        self._inboxes: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._start_threads(count - 1)

    @contextmanager
    def expect(self) -> Iterator[None]:
        """Says that the caller will run something now and again until the block ends: others leave it cores."""
        caller = threading.get_ident()
        with self._free:
            self._expecting.add(caller)
        try:
            yield
        finally:
            with self._free:
                self._expecting.discard(caller)

    def run(self, body: Body, lanes: int) -> None:
        """Calls `body` on some threads, which share the `lanes` between them in contiguous runs, until all return.

        An exception on any thread ends the others at their next barrier and is raised here.
        """
        count = self._take(lanes)
        try:
            shares = [range(lanes * m // count, lanes * (m + 1) // count) for m in range(count)]
            if count == 1:
                body(shares[0], 0, _ALONE)
                return
            run = _Run(body, count)
            for member in range(1, count):
                self._inboxes.put(lambda member=member: run.take_part(shares[member], member))  # type: ignore[misc]
            run.take_part(shares[0], 0)
            run.raise_first(count)
        finally:
            with self._free:
                self._return(threading.get_ident())

    def give_up(self, thread: threading.Thread) -> None:
        """Puts other cores in place of the cores of the run that `thread` asked for, and that does not return."""
        assert thread.ident is not None
        with self._free:
            self._expecting.discard(thread.ident)
            if not self._closed:
                self._start_threads(self._taken.get(thread.ident, 1) - 1)
            self._return(thread.ident)

    def close(self) -> None:
        """Ends the threads; further runs raise ExecutionError. One that hangs is left behind."""
        with self._free:
            self._closed = True
            self._free.notify_all()
        for _ in self._threads:
            self._inboxes.put(None)
        for thread in self._threads:
            thread.join(timeout=_CLOSE_TIMEOUT)

    def _start_threads(self, count: int) -> None:
        for _ in range(count):
            name = f"furiosa-core-{len(self._threads) + 1}"
            self._threads.append(threading.Thread(target=self._serve, name=name, daemon=True))
            self._threads[-1].start()

    def _return(self, caller: int) -> None:
        self._idle += self._taken.pop(caller, 0)
        self._free.notify_all()

    def _take(self, lanes: int) -> int:
        with self._free:
            self._free.wait_for(lambda: self._idle > 0 or self._closed)
            if self._closed:
                raise ExecutionError("the executor is closed; load the artifact again")
            count = max(1, min(self._idle, lanes, self.count // max(1, len(self._expecting))))
            self._idle -= count
            self._taken[threading.get_ident()] = count
            return count

    def _serve(self) -> None:
        while (task := self._inboxes.get()) is not None:
            task()


_ALONE = Barrier(1)
_CLOSE_TIMEOUT = 5.0
