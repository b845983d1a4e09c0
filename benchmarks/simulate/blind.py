"""`python -m benchmarks.simulate.blind`: figures that were found when all was fitted, with the constants as shipped."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable

import click
from rich.console import Console
from rich.table import Table

from benchmarks.simulate.fit import SPREAD, predicted
from benchmarks.simulate.measurements import Measurement, device_of, measurements


def blind_errors(rows: Iterable[Measurement]) -> dict[tuple[str, str, str], list[float]]:
    """Relative errors by device, software and model; a run that is said not to fit is an error of all."""
    found: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for row in rows:
        software = device_of(row.device).software[row.software]
        said = predicted(row, {name: getattr(software, name).value for name in SPREAD})
        found[row.device, row.software, row.model].append(-1.0 if math.isnan(said) else said / row.value - 1)
    return found


def show_blind(console: Console) -> None:
    """The table of errors, those of all rows last."""
    found = blind_errors(measurements("blind")[0])
    table = Table(title="never fitted, and found afterwards", title_justify="left")
    for name in ("device", "software", "model", "rows", "median", "worst"):
        table.add_column(name, justify="left" if name in ("device", "software", "model") else "right")
    everything = [error for errors in found.values() for error in errors]
    for kind, errors in [*found.items(), (("all", "", ""), everything)]:
        sizes = sorted(map(abs, errors))
        table.add_row(*kind, str(len(sizes)), f"{100 * statistics.median(sizes):.0f} %", f"{100 * sizes[-1]:.0f} %")
    console.print(table)


@click.command()
def main() -> None:
    """Compare predictions with figures that nothing was fitted to."""
    show_blind(Console(width=100))


if __name__ == "__main__":
    main()
