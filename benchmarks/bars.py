"""A figure and the bar it must keep."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

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
