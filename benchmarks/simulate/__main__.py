"""`python -m benchmarks.simulate`: predictions against published figures, as tables; fails if a bar is missed."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from benchmarks.simulate.blind import show_blind
from benchmarks.simulate.fit import FITTED, SPREAD, fit, predicted, prior_of, steps_of
from benchmarks.simulate.measurements import Measurement, device_of, measurements
from benchmarks.simulate.models import costs_of
from benchmarks.simulate.parity import draw_parity
from furiosa_llm.bench.metrics import figures_of
from furiosa_llm.simulate.clock import run
from furiosa_llm.simulate.requests import drawn, read_trace
from furiosa_llm.simulate.steps import BITS

SEEDS = range(5)
_HELD_OUT = 0.25
"""The share of the runs of a group that a seed holds out."""
_PACKAGE = Path(__file__).parents[2] / "furiosa_llm" / "simulate"
_TRACE = Path(__file__).with_name("trace.jsonl")
"""300 requests of a public run: github.com/casys-kaist/LLMServingSim, vLLM on an RTX PRO 6000."""
_TRANSFERS = (
    ("h100", "trt-llm", "h100", "nim"),
    ("h100", "trt-llm", "h100", "vllm"),
    ("h100", "trt-llm", "h200", "trt-llm"),
    ("h200", "trt-llm", "h100", "trt-llm"),
)
_SMALL, _LARGE = "8b", "70b"
_TIE = 0.05
"""Two figures that differ by less are no pair."""

Errors = dict[int, list[float]]
"""Row -> the relative errors of its predictions."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """Every prediction, and the constants that were fitted to all rows of a group."""

    rows: tuple[Measurement, ...]
    before: Errors
    after: Errors
    held_out: Errors
    transfer: dict[str, list[float]]
    constants: dict[tuple[str, str], dict[str, float]]


def evaluate(rows: Sequence[Measurement]) -> Results:
    """Fit each group to all of its rows, and five times to those that a seed leaves."""
    groups: dict[tuple[str, str], list[Measurement]] = defaultdict(list)
    for row in rows:
        groups[row.group].append(row)
    constants = {}
    before, after, held_out = defaultdict(list), defaultdict(list), defaultdict(list)
    for group, members in groups.items():
        prior = prior_of(group[0])
        constants[group] = fit(members, prior)
        for row in members:
            before[row.id].append(_error(row, prior))
            after[row.id].append(_error(row, constants[group]))
        for seed in SEEDS:
            hidden = _hidden(members, seed)
            found = fit([row for row in members if row.run not in hidden], prior)
            for row in members:
                if row.run in hidden:
                    held_out[row.id].append(_error(row, found))
    return Results(
        rows=tuple(rows),
        before=dict(before),
        after=dict(after),
        held_out=dict(held_out),
        transfer=_transfers(groups, constants),
        constants=constants,
    )


def _hidden(rows: Sequence[Measurement], seed: int) -> set[tuple[object, ...]]:
    runs = sorted({row.run for row in rows}, key=repr)
    random.Random(seed).shuffle(runs)
    return set(runs[: max(1, round(_HELD_OUT * len(runs)))])


def _error(row: Measurement, constants: Mapping[str, float]) -> float:
    return predicted(row, constants) / row.value - 1


def _transfers(
    groups: Mapping[tuple[str, str], Sequence[Measurement]], constants: Mapping[tuple[str, str], Mapping[str, float]]
) -> dict[str, list[float]]:
    """The errors where constants of one group, or of its small models, are used for another."""
    found = {}
    for first, software, second, other in _TRANSFERS:
        used = constants[first, software]
        found[f"{first} {software} to {second} {other}"] = [_error(row, used) for row in groups[second, other]]
    for (device, software), rows in groups.items():
        small, large = ([row for row in rows if size in row.model] for size in (_SMALL, _LARGE))
        if len(small) > 2 and large:
            used = fit(small, prior_of(device))
            found[f"{device} {software}: 8b to 70b"] = [_error(row, used) for row in large]
    return found


def spread_errors(rows: Iterable[Measurement]) -> Errors:
    """The errors of TPOT's 99th percentile in open loops, to which nothing is fitted, by the clock.

    The runs sent the 300 requests of one public trace at different rates; arrivals are drawn with five seeds, and the
    median counts.
    """
    lengths = read_trace(_TRACE)
    found = {}
    for row in rows:
        if row.metric == "tpot_p99":
            software = device_of(row.device).software[row.software]
            steps = steps_of(row, {name: getattr(software, name).value for name in SPREAD})
            said = []
            for seed in SEEDS:
                arriving = drawn(len(lengths), input_len=1, output_len=1, lengths=None, rate=row.amount, seed=seed)
                requests = [
                    dataclasses.replace(one, arrival=at.arrival) for one, at in zip(lengths, arriving, strict=True)
                ]
                said.append(figures_of(run(steps, requests).observed, {}).tpot.p99 or math.nan)
            found[row.id] = [statistics.median(said) / row.value - 1]
    return found


def rooms(rows: Iterable[Measurement]) -> dict[int, float]:
    """The errors of the room for cache, in which nothing is fitted but what a card reserves."""
    return {row.id: _error(row, prior_of(row.device)) for row in rows if row.metric == "kv_tokens"}


def ordered(results: Results) -> tuple[int, int]:
    """Of the pairs of one question asked of two devices or configurations: how many have the right order, of how many.

    A row that was held out counts with its mean prediction then.
    """
    asked: dict[tuple[object, ...], list[Measurement]] = defaultdict(list)
    for row in results.rows:
        asked[row.model, row.metric, row.mode, row.amount, row.input_len, row.output_len].append(row)
    right = total = 0
    for rows in asked.values():
        for one, two in combinations(rows, 2):
            same = (one.group, one.tp) == (two.group, two.tp)  # one configuration, measured twice
            if not same and abs(math.log(one.value / two.value)) > _TIE:
                says = [r.value * (1 + _mean(results.held_out.get(r.id) or results.after[r.id])) for r in (one, two)]
                right += (says[0] < says[1]) == (one.value < two.value)
                total += 1
    return right, total


def _mean(errors: Sequence[float]) -> float:
    return statistics.fmean(errors)


# -- tables --------------------------------------------------------------------------------------------------------


def flat(errors: Errors, rows: Iterable[Measurement]) -> list[float]:
    """The sizes of the errors of `rows`; a prediction that says that the run does not fit is an error of all."""
    found = [abs(error) for row in rows for error in errors.get(row.id, [])]
    return sorted(1.0 if math.isnan(error) else error for error in found)


def quantile(values: Sequence[float], share: float) -> float | None:
    """Of sorted values; None if there are none."""
    return values[min(int(share * len(values)), len(values) - 1)] if values else None


def summary(results: Results) -> list[dict[str, object]]:
    """A row for each device, software, size of model and metric, each device and software, and for all."""
    found = []
    for keys in (
        ("device", "software", "model", "metric"),
        ("device", "software", "metric"),
        ("device", "software"),
        (),
    ):
        kinds: dict[tuple[str, ...], list[Measurement]] = defaultdict(list)
        for row in results.rows:
            kinds[tuple(getattr(row, key) for key in keys)].append(row)
        for kind, rows in kinds.items():
            one: dict[str, object] = {**dict(zip(keys, kind, strict=True)), "rows": len(rows)}
            for name in ("before", "after", "held_out"):
                values = flat(getattr(results, name), rows)
                for statistic, share in (("median", 0.5), ("p90", 0.9), ("worst", 1.0)):
                    figure = quantile(values, share)
                    one[f"{name}_{statistic}"] = None if figure is None else round(figure, 4)
            found.append(one)
    return found


def show(results: Results, console: Console) -> None:
    """The tables of errors."""
    table = Table(title="absolute relative errors: median / p90", title_justify="left")
    for name in ("device", "software", "rows", "before fitting", "after", "held out, 5 seeds", "worst"):
        table.add_column(name, justify="left" if name in ("device", "software") else "right")
    for one in summary(results):
        if "metric" not in one:
            cells = [
                f"{_percent(one[f'{n}_median'])} / {_percent(one[f'{n}_p90'])}" for n in ("before", "after", "held_out")
            ]
            device = str(one.get("device", "all")).removeprefix("benchmarks/simulate/devices/").removesuffix(".toml")
            table.add_row(
                device, str(one.get("software", "")), str(one["rows"]), *cells, _percent(one["held_out_worst"])
            )
    console.print(table)
    table = Table(title="by metric, held out", title_justify="left")
    for name in ("metric", "figures", "median", "p90"):
        table.add_column(name, justify="right")
    for metric in FITTED:
        values = flat(results.held_out, [row for row in results.rows if row.metric == metric])
        table.add_row(metric, str(len(values)), _percent(quantile(values, 0.5)), _percent(quantile(values, 0.9)))
    console.print(table)
    table = Table(title="transfer, with no row of the target", title_justify="left")
    for name in ("from, to", "rows", "median", "worst"):
        table.add_column(name, justify="right")
    for name, errors in results.transfer.items():
        values = sorted(map(abs, errors))
        table.add_row(name, str(len(values)), _percent(quantile(values, 0.5)), _percent(values[-1]))
    console.print(table)


def _percent(share: object) -> str:
    return f"{100 * share:.0f} %" if isinstance(share, float) else "-"


# -- bars ----------------------------------------------------------------------------------------------------------


def bars(results: Results, room: Mapping[int, float], spread: Errors) -> list[tuple[str, float, float]]:
    """What is promised: a name, the figure and the most that it may be."""
    everything = flat(results.held_out, results.rows)
    closed = [
        row
        for row in results.rows
        if row.group == ("rngd", "furiosa-llm") and row.mode == "closed" and row.metric != "ttft"
    ]
    rngd = flat(results.held_out, closed)
    first = flat(results.held_out, [row for row in results.rows if row.metric == "ttft"])
    larger = sorted(abs(e) for name, errors in results.transfer.items() if "70b" in name for e in errors)
    right, total = ordered(results)
    tails = sorted(abs(error) for errors in spread.values() for error in errors)
    return [
        ("all, held out: median", quantile(everything, 0.5) or 0.0, 0.10),
        ("all, held out: p90", quantile(everything, 0.9) or 0.0, 0.35),
        ("RNGD 8B closed loop, held out: median", quantile(rngd, 0.5) or 0.0, 0.05),
        ("RNGD 8B closed loop, held out: worst", rngd[-1], 0.15),
        ("RNGD open loop, p99 of TPOT, never fitted: median", quantile(tails, 0.5) or 0.0, 0.08),
        ("RNGD open loop, p99 of TPOT, never fitted: worst", tails[-1], 0.25),
        ("TTFT, held out: median", quantile(first, 0.5) or 0.0, 0.20),
        ("8B to 70B on the same device and software: median", quantile(larger, 0.5) or 0.0, 0.10),
        (f"pairs in the wrong order, of {total}", 1 - right / total, 0.05),
        ("KV room, RNGD: worst", max(abs(e) for i, e in room.items() if i in (240, 241)), 0.03),
        ("KV room, others: worst", max(abs(e) for i, e in room.items() if i not in (240, 241)), 0.06),
    ]


def write_constants(results: Results) -> None:
    """The fitted constants into the device files."""
    for (device, software), constants in results.constants.items():
        file = _PACKAGE / "devices" / f"{device}.toml"
        if file.exists():
            count = sum(row.group == (device, software) for row in results.rows)
            file.write_text(_with_constants(file.read_text(), software, constants, count))


def write_errors(results: Results, spread: Errors, rows: Iterable[Measurement]) -> None:
    """The errors that answers are shown with."""
    tails: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in rows:
        tails[row.group] += [abs(error) for error in spread.get(row.id, [])]
    unfitted = [
        {
            "device": device,
            "software": software,
            "metric": "tpot_p99",
            "rows": len(errors),
            "before_median": round(statistics.median(errors), 4),
            "held_out_median": None,
        }
        for (device, software), errors in tails.items()
        if errors
    ]
    found = {
        "groups": [*summary(results), *unfitted],
        "transfer": {name: quantile(sorted(map(abs, e)), 0.5) for name, e in results.transfer.items()},
        "domain": _domain(results.rows),
        "points": points(results.rows),
    }
    (_PACKAGE / "validation.json").write_text(json.dumps(found, indent=1) + "\n")


def points(rows: Iterable[Measurement]) -> list[dict[str, object]]:
    """The TPOT of closed loops, for the page of a simulation like them."""
    return [
        {
            "device": row.device,
            "software": row.software,
            "tp": row.tp,
            "bits": BITS[row.weights],
            "flops": round(costs_of(row.model, row.tp).flops_per_token * row.tp),
            "input_len": row.input_len,
            "output_len": row.output_len,
            "users": row.amount,
            "tpot": row.value,
            "source": row.source,
        }
        for row in rows
        if row.mode == "closed" and row.metric == "tpot" and row.pp == row.dp == 1
    ]


def _domain(rows: Iterable[Measurement]) -> dict[str, dict[str, list[float]]]:
    """The ranges of what was measured, by device and software."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        ranges = found.setdefault(f"{row.device} {row.software}", {})
        for name, value in (
            ("tp", row.tp),
            ("pp", row.pp),
            ("input_len", row.input_len),
            ("output_len", row.output_len),
        ):
            low, high = ranges.get(name, [value, value])
            ranges[name] = [min(low, value), max(high, value)]
    return found


def _with_constants(text: str, software: str, constants: Mapping[str, float], count: int) -> str:
    head, mark, table = text.partition(f"[software.{software}]\n")
    assert mark, f"no table of {software}"
    own, break_, rest = table.partition("\n[")
    for name in SPREAD:
        unit = "s" if name.endswith("_time") or "_time_" in name else "1"
        source = f"benchmarks/simulate: {count} rows and a prior"
        entry = f'{{ value = {constants[name]:.3g}, unit = "{unit}", source = "{source}", mark = "fitted" }}'
        own = re.sub(rf"^{name} = .*$", f"{name} = {entry}", own, flags=re.MULTILINE)
    return head + mark + own + break_ + rest


@click.command()
@click.option("--write", is_flag=True, help="Write the fitted constants and the errors into furiosa_llm/simulate.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw what was held out into this file: docs/parity.png.")
def main(write: bool, plot: Path | None) -> None:
    """Compare predictions with published measurements."""
    rows, refused = measurements()
    results = evaluate([row for row in rows if row.fitted])
    console = Console()
    show(results, console)
    show_blind(console)
    if plot is not None:
        draw_parity(results.rows, results.held_out, plot)
    for number, reason in refused.items():
        console.print(f"row {number} is not used: {reason}", highlight=False, markup=False)
    if write:
        write_constants(results)
    spread = spread_errors(rows)
    if write:
        write_errors(results, spread, rows)
    missed = 0
    for name, figure, most in bars(results, rooms(rows), spread):
        missed += figure > most
        console.print(f"{'MISSED' if figure > most else 'ok':6} {name}: {100 * figure:.1f} %, bar {100 * most:.0f} %")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
