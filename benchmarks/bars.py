"""A figure and the bar it must keep."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One measured figure. It keeps its bar if it is at most `limit`; without a limit it is reported only."""

    what: str
    figure: float
    limit: float | None
    unit: str = ""
    beside: str = ""
    """What a reader should know with the figure: the other side's time, the spread, the padding."""

    @property
    def kept(self) -> bool:
        """Whether the bar is kept."""
        return self.limit is None or self.figure <= self.limit


def show(bars: Iterable[Bar], console: Console) -> bool:
    """Print a table of `bars`; returns whether all are kept."""
    table = Table()
    for column in ("what", "figure", "bar", "", "beside"):
        table.add_column(column, overflow="fold")
    kept = True
    for bar in bars:
        kept &= bar.kept
        limit = "" if bar.limit is None else f"at most {bar.limit:g}{bar.unit}"
        verdict = "" if bar.limit is None else "kept" if bar.kept else "MISSED"
        table.add_row(bar.what, f"{bar.figure:.4g}{bar.unit}", limit, verdict, bar.beside)
    console.print(table)
    return kept


def put_into(page: Path, what: str, text: str) -> None:
    """Puts `text` between the marks of `what` in `page`; raises ValueError if they are not there."""
    begin, end = f"<!-- {what} -->\n", f"<!-- end of {what} -->"
    before, found, rest = page.read_text(encoding="utf-8").partition(begin)
    _, found_too, after = rest.partition(end)
    if not (found and found_too):
        raise ValueError(f"{page}: found no {begin.strip()} followed by {end}; put the two lines where the table goes")
    page.write_text(f"{before}{begin}{text}\n{end}{after}", encoding="utf-8")
