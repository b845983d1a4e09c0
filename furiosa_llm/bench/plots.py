"""Plots of runs: a picture, or one page of HTML with the pictures and the tables in it."""

from __future__ import annotations

import html
import io
import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from furiosa_llm.bench.report import LATENCIES, latency_rows, legend, throughput_rows
from furiosa_llm.bench.sweep import Run
from furiosa_llm.runtime.artifact.steering import ESCAPES
from furiosa_llm.runtime.errors import InputError, UnsupportedError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PICTURES = (".png", ".svg", ".pdf")
SUFFIXES = (*PICTURES, ".html")

_STYLE = """
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif; }
body { max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 1rem 0; }
th, td { padding: 0.2rem 0.8rem; text-align: right; border-bottom: 1px solid #8886; }
th:first-child, td:first-child, .text { text-align: left; }
svg { width: 100%; height: auto; background: white; border-radius: 6px; }
"""


def check_plot(path: Path) -> None:
    """Raises InputError if no plot of that suffix can be made, UnsupportedError if matplotlib is not installed."""
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"--plot {path}: found the suffix {path.suffix!r}, expected one of {', '.join(SUFFIXES)}")
    if find_spec("matplotlib") is None:
        raise UnsupportedError(
            "plots need matplotlib, which is not installed; run: pip install 'furiosa-llm-onnx[plots]'"
        )


def plot(runs: Sequence[Run], path: Path, report: dict[str, Any]) -> None:
    """Writes the plots of `runs` to `path`, as its suffix says; `report` goes into a page as JSON."""
    if path.suffix.lower() == ".html":
        path.write_text(_page(runs, report).translate(ESCAPES), "utf-8")
    else:
        _figure(runs).savefig(path, dpi=120)


def _figure(runs: Sequence[Run]) -> Figure:
    """Throughput of each run, and how its latencies are spread."""
    from matplotlib.figure import Figure  # an extra, and it takes half a second to import

    figure = Figure(figsize=(11, 7.5), layout="constrained")
    throughput, *others = figure.subplots(2, 2).flat
    _bars(throughput, runs)
    for axes, name in zip(others, ("ttft", "tpot", "e2el"), strict=True):
        _shares(axes, runs, name)
    if len(runs) > 1:
        figure.legend(*others[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(4, len(runs)))
    return figure


def _bars(axes: Axes, runs: Sequence[Run]) -> None:
    places = range(len(runs))
    bars = axes.barh(
        places, [run.figures.output_throughput for run in runs], color=[f"C{place % 10}" for place in places]
    )
    axes.bar_label(bars, fmt="%.4g", padding=3)
    axes.set_yticks(places, [run.label for run in runs])
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel("output tokens per second")


def _shares(axes: Axes, runs: Sequence[Run], name: str) -> None:
    """The share of requests that took at most so long."""
    for index, run in enumerate(runs):
        values = np.sort(np.asarray(run.latencies[name]))
        shares = np.arange(1, len(values) + 1) / max(1, len(values))
        axes.step(values, shares, where="post", label=run.label, color=f"C{index % 10}")
    axes.set_ylim(0, 1.02)
    axes.grid(alpha=0.3)
    axes.set_xlabel(f"{LATENCIES[name]} ({name.upper()}), ms")
    axes.set_ylabel("share of requests")


def _page(runs: Sequence[Run], report: dict[str, Any]) -> str:
    picture = io.StringIO()
    _figure(runs).savefig(picture, format="svg")
    svg = picture.getvalue()
    title = html.escape(f"furiosa-llm bench: {report['artifact']}")
    # "<" ends no script within a string of JSON if it is written as an escape.
    data = json.dumps(report, indent=1).replace("<", "\\u003c")
    machine = ", ".join(f"{name} {value}" for name, value in report["machine"].items())
    return "\n".join(
        (
            "<!doctype html>",
            f'<html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
            f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>',
            f"<h1>{title}</h1><p>{html.escape(machine)}</p>",
            _table(*throughput_rows(runs), text_columns=1),
            svg[svg.index("<svg") :],
            _table(*latency_rows(runs), text_columns=2),
            "<ul>",
            *(f"<li>{html.escape(line)}</li>" for line in legend(runs)),
            "</ul>",
            f'<script type="application/json" id="report">{data}</script>',
            "</body></html>\n",
        )
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, text_columns: int) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        shown = (
            f'<{tag} class="text">{html.escape(cell)}</{tag}>'
            if index < text_columns
            else f"<{tag}>{html.escape(cell)}</{tag}>"
            for index, cell in enumerate(cells)
        )
        return f"<tr>{''.join(shown)}</tr>"

    body = "\n".join(row(cells, "td") for cells in rows)
    return f'<div class="wide"><table><thead>{row(head, "th")}</thead><tbody>\n{body}\n</tbody></table></div>'
