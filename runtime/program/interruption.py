"""Ends runs of onnxruntime from another thread: because they take too long, or because nobody waits any more."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import onnxruntime

from furiosa_llm.runtime.errors import ExecutionError

_SLOWEST = 10
_SHORTEST_WAIT = 0.01


class Allowance:
    """Seconds that work may take, both of the clock and of the processor time that this process gets.

    On a busy machine that is more of the clock, but ten times as much at most: what hangs may take no processor time.
    """

    __slots__ = ("_clock", "_processor", "seconds")

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._clock = time.monotonic()
        self._processor = time.process_time()

    def left(self) -> float:
        """For how many seconds of the clock it lasts, if one processor works; 0: it is used up."""
        clock = time.monotonic() - self._clock
        processor = time.process_time() - self._processor
        return max(0.0, min(self.seconds - min(clock, processor), _SLOWEST * self.seconds - clock))

    def wait(self, done: Callable[[float], bool]) -> bool:
        """Whether something is done before it is used up; `done` waits for that for so many seconds, and says so."""
        while not done(max(self.left(), _SHORTEST_WAIT)):
            if not self.left():
                return False
        return True


@contextmanager
def ended_after(seconds: float, end: Callable[[], object]) -> Iterator[None]:
    """Has another thread call `end` if the block takes more than it may."""
    allowance, done = Allowance(seconds), threading.Event()

    def watch() -> None:
        if not allowance.wait(done.wait):
            end()

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    try:
        yield
    finally:
        done.set()
        watching.join()


class Interruption:
    """Goes into every run of its owner: `interrupt` ends what is under way at its next node, inside of Loops too.

    One kernel that takes long is not ended: whoever waits must not wait for ever. What comes later fails at once.
    """

    __slots__ = ("options", "reason")

    def __init__(self) -> None:
        self.options = onnxruntime.RunOptions()
        self.reason: ExecutionError | None = None
        """Why; None as long as nothing was interrupted."""

    def interrupt(self, reason: ExecutionError) -> None:
        """Ends what runs, and whatever will: it raises `reason`."""
        if self.reason is None:
            self.reason = reason
            self.options.terminate = True

    def check(self) -> None:
        """Raises the reason if there is one."""
        if self.reason is not None:
            raise self.reason

    @contextmanager
    def after(self, seconds: float, reason: ExecutionError) -> Iterator[None]:
        """Interrupts a block that takes longer; whoever wants to run on then takes another object."""
        with ended_after(seconds, lambda: self.interrupt(reason)):
            yield
