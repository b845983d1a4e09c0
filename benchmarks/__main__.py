"""`python -m benchmarks`: measure, print a table, fail if a bar is missed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import click
from rich.console import Console

from benchmarks import (
    artifact,
    building,
    fusion,
    growth,
    invariance,
    page,
    parallelism,
    parity,
    planning,
    serve,
    serving,
    silence,
    speed,
    startup,
)
from benchmarks.bars import Bar, show

SUITES: dict[str, Callable[[], Iterator[Bar]]] = {
    "artifact": artifact.bars,
    "startup": startup.bars,
    "silence": silence.bars,
    "building": building.bars,
    "planning": planning.bars,
    "fusion": fusion.bars,
    "parity": parity.bars,
    "speed": speed.bars,
    "prefill": speed.prefill_bars,
    "serving": serving.bars,
    "invariance": invariance.bars,
    "serve": serve.bars,
    "parallelism": parallelism.bars,
    "page": page.bars,
    "large": speed.large_bars,
    "growth": growth.bars,
}
"""In this order: the memory of this process counts as that of those that it starts, so who measures theirs is first."""


@click.command()
@click.option("--only", "names", multiple=True, type=click.Choice(list(SUITES)), help="One suite; may be repeated.")
def main(names: tuple[str, ...]) -> None:
    """Measure every bar, or those of some suites."""
    console = Console(width=180)
    kept = True
    for name in names or tuple(SUITES):
        console.rule(name)
        kept &= show(SUITES[name](), console)
    sys.exit(0 if kept else 1)


main()
