"""Rich's console, with what would steer the terminal written out, whatever name or text it came in."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import IO

import rich.console
from rich.segment import Segment

from furiosa_llm.runtime.artifact.steering import ESCAPES

_WIDTH = 120
_NOTEBOOK = '<pre style="white-space: pre; overflow-x: auto; line-height: normal; font-family: monospace">{code}</pre>'


class Console(rich.console.Console):
    """Rich's, with what is shown written out; what rich itself says to the terminal passes."""

    @property
    def file(self) -> IO[str]:
        """Where it writes: the stream itself, also where several stand before it, as of a bar and a command line."""
        file = super().file
        while (proxied := getattr(file, "rich_proxied_file", None)) is not None:
            file = proxied
        return file

    @file.setter
    def file(self, new_file: IO[str]) -> None:
        self._file = new_file

    def render(
        self, renderable: rich.console.RenderableType, options: rich.console.ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """The segments of `renderable`."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(segment.text.translate(ESCAPES), segment.style)


def text(*shown: rich.console.RenderableType, markup: bool = True) -> str:
    """What a terminal of `_WIDTH` columns would show, without colours."""
    return _recorded(shown, markup).export_text().rstrip()


def html(*shown: rich.console.RenderableType, markup: bool = True) -> str:
    """The same for a notebook, with colours."""
    return _recorded(shown, markup).export_html(inline_styles=True, code_format=_NOTEBOOK)


def _recorded(shown: Iterable[rich.console.RenderableType], markup: bool) -> Console:
    console = Console(
        file=io.StringIO(),
        record=True,
        width=_WIDTH,
        force_jupyter=False,
        force_terminal=False,
        soft_wrap=True,
        highlight=False,
        markup=markup,
    )
    for one in shown:
        console.print(one, crop=False)
    return console
