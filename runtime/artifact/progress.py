"""What takes long says what it does, and whoever waits is shown it: by a bar on a terminal, or in lines."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec
from typing import TYPE_CHECKING

from furiosa_llm.runtime.artifact.units import nbytes

if TYPE_CHECKING:
    from furiosa_llm.runtime.artifact.console import Console

Progress = Callable[[str, int, int], None]
"""Is told what is being done, how much of it is done and of how much: bytes while weights are written, else things.

Of 0 or 1: how much there is to do is not known.
"""

_WORDS = {
    "load": "reading the graph",
    "analyse": "finding what depends on what",
    "plan": "choosing what to split",
    "lower": "writing the program",
    "write": "writing weights",
    "prove": "proving the program",
}
"""The stages of a build, for people; others are told in words."""
_IN_BYTES = ("write",)
_SECONDS = 0.9
"""Between two lines about the same."""
_told: ContextVar[Progress | None] = ContextVar("progress", default=None)


def told() -> Progress:
    """Who is told in this context, by default nobody: for threads, which have contexts of their own."""
    return _told.get() or _tell_nobody


def tell(doing: str, done: int = 0, total: int = 1) -> None:
    """Says what is being done."""
    told()(doing, done, total)


@contextmanager
def telling(progress: Progress) -> Iterator[None]:
    """`progress` is told what happens inside."""
    token = _told.set(progress)
    try:
        yield
    finally:
        _told.reset(token)


@contextmanager
def shown(asked: bool | Progress | None = None) -> Iterator[None]:
    """Shows on standard error what happens inside; None: only on a terminal and in a notebook.

    Where somebody is told already it stays with that, and where nobody is to be.
    """
    if callable(asked) or asked is False:
        with telling(asked or _tell_nobody):
            yield
    elif _told.get() is not None or not (asked or _has_reader()):
        yield
    else:
        from furiosa_llm.runtime.artifact.console import Console  # 30 ms

        console = Console(stderr=True)
        with (_bar if _draws(console) else _lines)(console):
            yield


def _tell_nobody(_: str, __: int, ___: int) -> None:
    pass


def _has_reader() -> bool:
    return sys.stderr.isatty() or "ipykernel" in sys.modules


def _draws(console: Console) -> bool:
    return find_spec("ipywidgets") is not None if console.is_jupyter else console.is_terminal


@contextmanager
def _bar(console: Console) -> Iterator[None]:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[amount]}"))
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, *times, console=console, transient=True, redirect_stdout=False) as progress:
        task = progress.add_task("", total=None, amount="")
        stage = _Stage()

        def show(name: str, done: int, total: int) -> None:
            if stage.enter(name):
                progress.reset(task)
            known = total if total > 1 else None
            progress.update(
                task, description=_words(name), completed=done, total=known, amount=stage.amount(done, total)
            )

        with telling(show):
            yield


@contextmanager
def _lines(console: Console) -> Iterator[None]:
    lines = _Lines(console)
    watch = threading.Thread(target=lines.watch, name="progress", daemon=True)
    watch.start()
    try:
        with telling(lines.show):
            yield
    finally:
        lines.ended.set()
        watch.join()


class _Lines:
    """A line when another stage begins, and one a second: of what is done since, or for how long it is under way."""

    def __init__(self, console: Console) -> None:
        self.ended = threading.Event()
        self._console = console
        self._stage = _Stage()
        self._amount, self._last = "", 0.0

    def show(self, name: str, done: int, total: int) -> None:
        """Is told what is done."""
        begins = self._stage.enter(name)
        self._amount = self._stage.amount(done, total)
        if begins or self._is_time():
            self._say(self._amount)

    def watch(self) -> None:
        """Says until the end what takes long."""
        while not self.ended.wait(max(0.05, self._last + _SECONDS - time.monotonic())):
            if self._stage.name and self._is_time():
                self._say(", ".join(filter(None, (self._amount, f"{self._stage.seconds:.0f} s"))))

    def _is_time(self) -> bool:
        return time.monotonic() - self._last >= _SECONDS

    def _say(self, what: str) -> None:
        self._last = time.monotonic()
        words = _words(self._stage.name)
        self._console.print(f"{words}{what and ': '}{what}", highlight=False, markup=False, soft_wrap=True)


def _words(stage: str) -> str:
    return _WORDS.get(stage, stage)


class _Stage:
    """The stage that is under way, and since when."""

    def __init__(self) -> None:
        self.name, self._since = "", 0.0

    @property
    def seconds(self) -> float:
        """For how long it is under way."""
        return time.monotonic() - self._since

    def enter(self, name: str) -> bool:
        """Whether `name` is another stage than before."""
        if name == self.name:
            return False
        self.name, self._since = name, time.monotonic()
        return True

    def amount(self, done: int, total: int) -> str:
        """How much is done; empty if it is not known of how much."""
        if total <= 1:
            return ""
        if self.name not in _IN_BYTES:
            return f"{done} of {total}"
        rate = done / max(self.seconds, 1e-3)
        return f"{nbytes(done)} of {nbytes(total)}, {nbytes(rate)}/s"
