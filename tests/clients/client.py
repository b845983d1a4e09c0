"""What the programs of this folder have in common; they run in environments that have nothing of this project.

A program is called with the server's URL, the model's name, and the folder of what the model is to say next. Its checks
run one after the other; it ends with status 1 if one of them failed.
"""

from __future__ import annotations

import asyncio
import inspect
import itertools
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

E = TypeVar("E", bound=Exception)


@dataclass(frozen=True)
class Server:
    """The server that a program talks to."""

    root: str
    model: str
    folder: Path
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    @property
    def url(self) -> str:
        """Where OpenAI's protocols begin."""
        return f"{self.root}/v1"

    def say(self, *texts: str) -> None:
        """Lets the next answers be these."""
        for text in texts:
            (self.folder / f"{next(self._numbers):06}.txt").write_text(text, encoding="utf-8")

    def left(self) -> str:
        """What was not said of what was to be: it was not allowed, or nobody asked for it."""
        refused = self.folder / "refused"
        left = [file.read_text(encoding="utf-8") for file in sorted(self.folder.glob("*.txt"))]
        found = refused.read_text(encoding="utf-8") if refused.exists() else ""
        return found + (f"nobody asked for {left}\n" if left else "")

    def check(self) -> None:
        """Whether all was said that was to be."""
        left = self.left()
        assert not left, left

    def clear(self) -> None:
        """Forgets what was to be said, after a check that failed."""
        for file in self.folder.iterdir():
            file.unlink()


def refusal(kind: type[E], function: Callable[..., Any], **arguments: Any) -> E:
    """The error that a call raises, and has to."""
    try:
        made = function(**arguments)
    except kind as error:
        return error
    raise AssertionError(f"expected {kind.__name__}, found {made!r}")


def call(name: str, arguments: str) -> str:
    """A call as the model of the scripts writes it."""
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def run(*checks: Callable[[Server], Any]) -> None:
    """Runs them, says what became of each, and ends the process."""
    server = Server(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
    with asyncio.Runner() as loop:  # one for all: libraries keep their connections
        failed = sum(not _passes(check, server, loop) for check in checks)
    sys.exit(bool(failed))


def _passes(check: Callable[[Server], Any], server: Server, loop: asyncio.Runner) -> bool:
    begin = time.monotonic()
    try:
        made = check(server)
        if inspect.iscoroutine(made):
            loop.run(made)
        server.check()
    except BaseException:  # noqa: BLE001 - whatever a library raises is a finding
        sys.stdout.write(f"FAILED  {check.__name__}\n{traceback.format_exc()[-3000:]}\n{server.left()}")
        server.clear()
        return False
    else:
        sys.stdout.write(f"ok      {check.__name__}, {time.monotonic() - begin:.1f} s\n")
        return True
    finally:
        sys.stdout.flush()
