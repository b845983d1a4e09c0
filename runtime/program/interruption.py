"""Ends runs of onnxruntime from another thread: because they take too long, or because nobody waits any more."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import onnxruntime

from furiosa_llm.runtime.errors import ExecutionError


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
        timer = threading.Timer(seconds, self.interrupt, (reason,))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            timer.join()
