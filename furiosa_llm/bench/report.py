"""The figures of runs for people, as tables, and for programs, as JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from furiosa_llm.bench.metrics import Figures, Spread, beside
from furiosa_llm.bench.sweep import Run

LATENCIES = {
    "ttft": "time to first token",
    "tpot": "time per output token",
    "itl": "inter-token latency",
    "e2el": "end-to-end latency",
}
"""The latencies by their names, with what these stand for."""

_PREDICTED = {"ttft": "TTFT, ms", "tpot": "TPOT, ms", "e2el": "E2EL, ms", "output_throughput": "output tok/s"}
_STATISTICS = ("mean", "p50", "p90", "p99", "max")
_COLUMNS: dict[str, Callable[[Figures], str]] = {
    "done": lambda one: str(one.completed),
    "failed": lambda one: str(one.failed),
    "s": lambda one: f"{one.duration:.2f}",
    "at once": lambda one: str(one.max_concurrency),
    "req/s": lambda one: f"{one.request_throughput:.2f}",
    "good req/s": lambda one: "-" if one.goodput is None else f"{one.goodput:.2f}",
    "output tok/s": lambda one: f"{one.output_throughput:.1f}",
    "total tok/s": lambda one: f"{one.total_throughput:.1f}",
}


def throughput_rows(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of throughput; runs are numbered from 1."""
    rows = [[str(number), *(show(run.figures) for show in _COLUMNS.values())] for number, run in enumerate(runs, 1)]
    return ["run", *_COLUMNS], rows


def latency_rows(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of latencies, in milliseconds."""
    rows = []
    for number, run in enumerate(runs, 1):
        for name in LATENCIES:
            spread: Spread = getattr(run.figures, name)
            shown = [_milliseconds(getattr(spread, statistic)) for statistic in _STATISTICS]
            rows.append([str(number), name.upper(), *shown])
    return ["run", "ms", *_STATISTICS], rows


def predicted_rows(runs: Sequence[Run]) -> list[list[str]]:
    """Rows of the table of predictions; none for a run that has none."""
    return [
        [str(number), _PREDICTED[name], f"{one['predicted']:.2f}", f"{one['measured']:.2f}", f"{one['error']:+.0%}"]
        for number, run in enumerate(runs, 1)
        if run.predicted is not None
        for name, one in beside(run.predicted, run.figures).items()
    ]


def legend(runs: Sequence[Run]) -> list[str]:
    """Which run is which, and what the latencies are."""
    return [
        *(f"{number}: {run.label}" for number, run in enumerate(runs, 1)),
        *(f"{name.upper()}: {long_name}" for name, long_name in LATENCIES.items()),
    ]


def show(runs: Sequence[Run], console: Console) -> None:
    """Prints the tables, and what is in them."""
    console.print(_table("throughput", *throughput_rows(runs), text_columns=1))
    console.print(_table("latency in milliseconds", *latency_rows(runs), text_columns=2))
    if predicted := predicted_rows(runs):
        head = ["run", "", "predicted", "measured", "error"]
        console.print(_table("predicted by simulate, means", head, predicted, text_columns=2))
    for line in legend(runs):
        console.print(line, highlight=False)


def report_json(
    runs: Iterable[Run], *, artifact: str, workload: dict[str, Any], machine: dict[str, Any]
) -> dict[str, Any]:
    """Everything, as one object."""
    return {"artifact": artifact, "machine": machine, "workload": workload, "runs": [run.as_dict() for run in runs]}


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], *, text_columns: int) -> Table:
    table = Table(title=title, title_justify="left")
    for index, name in enumerate(head):
        table.add_column(name, justify="left" if index < text_columns else "right")
    for row in rows:
        table.add_row(*row)
    return table


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
