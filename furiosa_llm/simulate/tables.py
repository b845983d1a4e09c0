"""Answers as text: a table with the error of every figure, a verdict, and what it all rests on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from rich import box
from rich.table import Table

from furiosa_llm.cli.terminal import Console
from furiosa_llm.runtime.artifact.units import counted
from furiosa_llm.simulate.believed import Belief
from furiosa_llm.simulate.closed_form import Load
from furiosa_llm.simulate.device import MARKS
from furiosa_llm.simulate.question import Answer, Report, Setting

_WIDTH = 140
"""Columns that a table may take: a narrow terminal wraps its lines, and no figure is cut."""
_ASSUMED = (
    "experts are chosen uniformly; a step takes as long as its slowest stage",
    "what stages on one host send each other takes no time",
    "8-bit weights are multiplied in 8 bits, 4-bit ones in 16; head and tables keep 16 bits",
    "without --requests or --trace: means, with requests of one length and no common beginning",
)


def show_report(found: Report, *, price: float | None) -> None:
    """Print everything."""
    if found.answers:
        _show_answers(found.setting, found.answers, limits=found.limits, price=price, tried=len(found.tried_answers))
    if found.limits and found.answers:
        _show_verdict(found)
    if found.clocked:
        _show_clocked(found)
    _show_assumptions(found.setting, calibrated=found.calibrated)


def _show_answers(
    setting: Setting, answers: Sequence[Answer], *, limits: Mapping[str, float], price: float | None, tried: int
) -> None:
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.width = max(console.width, _WIDTH)
    device = setting.device
    what = f"{setting.input_len:g} tokens in, {setting.output_len:g} out"
    kept = f"weights {setting.weights or 'as in the model'}, KV cache {setting.kv or 'as in the model'}"
    console.print(f"{device.title} with {setting.software_name}: {what}; {kept}")
    if tried:
        console.print(f"{tried} loads on every placement of the cards; those that no other beats at both:")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="")
    names = ["tp pp dp", "load", "TTFT", "TPOT", "tok/s/user", "tok/s", "tok/s/card", "room"]
    several = any(one.hosts > 1 for one in answers)
    names += ["hosts", "hops"] if several else []
    names += [*(["$/Mtok"] if price is not None else []), "J/tok", *(["keeps"] if limits else [])]
    for name in names:
        table.add_column(name, justify="left" if name in ("tp pp dp", "load") else "right", no_wrap=True)
    for one in answers:
        table.add_row(*_cells(setting, one, limits, price, several=several))
    console.print(table, crop=False)
    for name, belief in answers[0].beliefs.items():
        console.print(f"{_LONG[name]}: {_error(belief)}")


_LONG = {"ttft": "TTFT", "tpot": "TPOT and tok/s a user", "output_tps": "tok/s", "tpot_p99": "TPOT p99"}


def _error(belief: Belief) -> str:
    size = "unknown error" if belief.error is None else f"median error {100 * belief.error:.0f} %"
    return f"{'extrapolated, ' if belief.extrapolated else ''}{size} ({belief.basis})"


def _cells(
    setting: Setting, one: Answer, limits: Mapping[str, float], price: float | None, *, several: bool
) -> list[str]:
    place, found = one.placement, one.estimate
    queue = " queue grows" if found.saturated and one.load.kind == "open" else " waits" if found.saturated else ""
    cells = [
        f"{place.tensor_parallel_size} {place.pipeline_parallel_size} {place.data_parallel_size}",
        f"{_load(one.load)}{queue}",
        _time(found.ttft),
        _time(found.tpot),
        f"{one.user_tps:.1f}",
        f"{found.output_tps:,.0f}",
        f"{one.card_tps:,.0f}",
        f"{found.most_concurrency:,.0f}",
        *([str(one.hosts), str(one.hops)] if several else []),
    ]
    if price is not None:
        cells.append(f"{price * one.cards / 3600 / found.output_tps * 1e6:.3g}")
    power = setting.device.power_busy.value * one.cards
    cells.append(f"{power / found.output_tps:.3g}" if power else "-")
    return [*cells, "yes" if one.keeps(limits) else "no"] if limits else cells


def _load(load: Load) -> str:
    return f"{load.amount:g} req/s" if load.kind == "open" else f"{load.amount:g} users"


def _time(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _show_verdict(found: Report) -> None:
    """What keeps the limits."""
    console = Console(soft_wrap=True, highlight=False, markup=False)
    asked = " and ".join(f"{name} {limit:g} ms" for name, limit in found.limits.items())
    load, fewest = _load(found.last), found.fewest
    if found.searched and fewest is None:
        console.print(f"No placement on up to {counted(found.cards, 'card')} does {load} within {asked}.")
    elif fewest is not None:
        verb = "suffices" if fewest.cards == 1 else "suffice"
        console.print(f"{load} within {asked}: {counted(fewest.cards, 'card')} {verb}, at {fewest.placement}.")
    else:
        good = [one for one in found.answers if one.keeps(found.limits)]
        if good:
            best = max(good, key=lambda one: one.estimate.output_tps)
            console.print(f"Within {asked}: up to {best.estimate.output_tps:,.0f} tok/s, at {_load(best.load)}.")
        else:
            console.print(f"None of these loads is done within {asked}.")


def _show_clocked(found: Report) -> None:
    """The loads that were served one by one: means, and what 99 of 100 requests keep."""
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.width = max(console.width, _WIDTH)
    setting = found.setting
    console.print(
        f"{setting.device.title} with {setting.software_name}: requests one by one, by this engine's scheduler"
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="")
    names = ["tp pp dp", "load", "TTFT", "p99", "TPOT", "p99", "E2E", "p99", "tok/s", "req/s", "at once"]
    for name in [*names, *(["good req/s"] if found.limits else [])]:
        table.add_column(name, justify="left" if name in ("tp pp dp", "load") else "right", no_wrap=True)
    for one in found.clocked:
        place, figures = one.placement, one.figures
        cells = [f"{place.tensor_parallel_size} {place.pipeline_parallel_size} {place.data_parallel_size}", one.load]
        for spread in (figures.ttft, figures.tpot, figures.e2el):
            cells += ["-" if ms is None else _time(ms / 1000) for ms in (spread.mean, spread.p99)]
        cells += [
            f"{figures.output_throughput:,.0f}",
            f"{figures.request_throughput:.2f}",
            f"{figures.max_concurrency}",
        ]
        table.add_row(*cells, *([f"{figures.goodput:.2f}"] if figures.goodput is not None else []))
    console.print(table, crop=False)
    for name, belief in found.clocked[0].beliefs.items():
        console.print(f"{_LONG[name]}: {_error(belief)}")


def _show_assumptions(setting: Setting, *, calibrated: bool) -> None:
    """What the figures rest on."""
    console = Console(soft_wrap=True, highlight=False, markup=False)
    marks = Counter(constant.mark for constant in setting.device.constants(setting.software_name).values())
    constants = ", ".join(f"{marks[mark]} {mark}" for mark in MARKS if marks[mark])
    console.print(
        f"\nRests on {constants} constants{', the times of layers or requests on your figure' * calibrated}; on:"
    )
    for text in _ASSUMED:
        console.print(f"  {text}")
