"""The one way to the terminal: what would steer it is written out, whatever name or text it came in."""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, TextIO, cast

import click
from rich.text import Text

from furiosa_llm.runtime.artifact.console import Console
from furiosa_llm.runtime.artifact.errors import OutputFileError
from furiosa_llm.runtime.artifact.steering import ESCAPES

__all__ = ["Console", "StreamError", "cell", "escaped_streams", "line"]

_ON_ONE_LINE = {**ESCAPES, ord("\t"): "\\t", ord("\n"): "\\n"}


def line(text: str, *, err: bool = False) -> None:
    """Write one line, on standard error if `err`; a name in it cannot begin another."""
    click.echo(text.translate(_ON_ONE_LINE), err=err)


def cell(text: str) -> Text:
    """What a table or title shows as it is: no markup, and on one line."""
    return Text(text.translate(_ON_ONE_LINE))


class StreamError(OutputFileError, OSError):
    """Standard output or standard error cannot be written."""


class _Checked:
    """A text stream that raises StreamError if it cannot be written.

    A BrokenPipeError passes, by which click ends without a word.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write `text`."""
        with self._checked():
            return self._stream.write(text)

    def flush(self) -> None:
        """Write what is still held back."""
        with self._checked():
            self._stream.flush()

    @contextlib.contextmanager
    def _checked(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            raise
        except OSError as error:
            raise StreamError(
                f"{self._stream.name} cannot be written: {error.strerror}; free some space, or send it elsewhere"
            ) from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Escaped:
    """A text stream that writes out what would steer the terminal, and what the stream's encoding lacks."""

    encoding = "utf-8"

    def __init__(self, stream: TextIO) -> None:
        self.rich_proxied_file = _Checked(stream)
        """Where rich's consoles write, by the name that they look for."""

    def write(self, text: str) -> int:
        """Write `text`."""
        stream = self.rich_proxied_file
        encoding = stream.encoding or "utf-8"
        stream.write(text.translate(ESCAPES).encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write all `lines`."""
        for one in lines:
            self.write(one)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rich_proxied_file, name)


@contextlib.contextmanager
def escaped_streams() -> Iterator[None]:
    """Make standard output and error write out what would steer the terminal; so does what ends the process."""
    out, err = _Escaped(sys.stdout), _Escaped(sys.stderr)

    def uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        err.writelines(traceback.format_exception(kind, error, trace))

    sys.excepthook = uncaught
    with contextlib.redirect_stdout(cast(TextIO, out)), contextlib.redirect_stderr(cast(TextIO, err)):
        yield
