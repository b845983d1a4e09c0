"""The parity plot of docs/simulation.md: what was predicted of runs that were held out, against what was published."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.simulate.measurements import Measurement

_UNITS = {"output_tps": "tokens a second", "tpot": "milliseconds", "ttft": "milliseconds", "e2e": "milliseconds"}
_BAND = 0.25


def draw_parity(rows: Sequence[Measurement], held_out: Mapping[int, Sequence[float]], file: Path) -> None:
    """One panel for tokens a second, one for latencies; the band is a quarter more and a quarter less."""
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    for axes, unit in zip(figure.subplots(1, 2), ("tokens a second", "milliseconds"), strict=True):
        shown = [r for r in rows if _UNITS.get(r.metric, "milliseconds") == unit and _mean(held_out, r) is not None]
        low, high = min(r.value for r in shown) / 2, max(r.value for r in shown) * 2
        axes.fill_between(
            [low, high], [low * (1 - _BAND), high * (1 - _BAND)], [low * (1 + _BAND), high * (1 + _BAND)], alpha=0.15
        )
        for device in sorted({r.device for r in shown}):
            own = [r for r in shown if r.device == device]
            values = [r.value * (1 + (_mean(held_out, r) or 0.0)) for r in own]
            axes.plot([r.value for r in own], values, "o", markersize=4, label=Path(device).stem)
        axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
        axes.set(xlabel=f"published, {unit}", ylabel=f"predicted, held out, {unit}")
        axes.legend(fontsize="small")
    figure.savefig(file, dpi=110)


def _mean(held_out: Mapping[int, Sequence[float]], row: Measurement) -> float | None:
    known = [error for error in held_out.get(row.id, ()) if not math.isnan(error)]
    return statistics.fmean(known) if known else None
