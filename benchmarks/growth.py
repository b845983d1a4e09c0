"""How processor time grows with what a model and a request have more of: `python -m benchmarks.growth`.

A factor's cases are loaded side by side and take turns, so that none has the processor's cache to itself, and of a few
rounds the least counts. The exponent is the slope of the logarithms. Of the time in layers and hidden size that of a
model of next to no weights is taken off first: t = a + b * x**k, with a measured.
"""

from __future__ import annotations

import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
from rich.console import Console

from benchmarks.artifacts import run_measured
from benchmarks.bars import Bar, put_into, show
from benchmarks.stepping import PAST, THREADS, Served
from fixtures.filled import fill
from fixtures.outline import write_outline
from furiosa_llm.example.llama.config import LlamaConfig
from furiosa_llm.runtime.artifact.reader import open_artifact
from furiosa_llm.runtime.placement.stages import choose_stages
from furiosa_llm.runtime.runners.local_runner import Host

PLOT = Path("docs/cost-growth.png")
PAGE = Path("docs/benchmarks.md")
_ROUNDS, _LONG_ROUNDS, _STEPS = 5, 2, 8
_WARM_SECONDS = 0.5
"""Behind a prefill, in which steps do not count: for 0.4 s they take up to 1.3 times as long as later ones."""
_APART = 0.05
"""How far an exponent may be from the one that is expected."""
_BUILD = "import sys; from furiosa_llm.cli.main import main; main()"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is run: a decoder of `layers` and a `hidden` size on some PEs, stages, replicas and threads.

    The steps of `warm` seconds behind the prefill do not count. Where time must be linear weights are more than
    processors keep in their caches: a model of half a cache is faster for its size than one of two.
    """

    layers: int = 8
    hidden: int = 512
    tp: int = 4
    pp: int = 1
    dp: int = 1
    threads: int = THREADS
    batch: int = 1
    context: int = PAST
    vocab: int = 256
    tokens: int = _STEPS
    warm: float = _WARM_SECONDS


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Milliseconds of processor time: of all decode steps, and of the prefill of all prompts."""

    decode: float
    prefill: float

    def without(self, constant: Cost) -> Cost:
        """What is left of it."""
        return Cost(decode=self.decode - constant.decode, prefill=self.prefill - constant.prefill)


FACTORS: Mapping[str, Sequence[tuple[int, Case]]] = {
    "layers": [(n, Case(layers=n, hidden=1024)) for n in (4, 8, 16)],
    "hidden size, squared": [(n * n, Case(hidden=n, layers=4)) for n in (1024, 1536, 2048)],
    "tokens": [(n, Case(tokens=n, layers=4, hidden=1024)) for n in (32, 64, 128, 256)],
    "batch": [(n, Case(batch=n)) for n in (1, 2, 4, 8, 16)],
    "context": [(n, Case(context=n, layers=2, hidden=256, vocab=1 << 15)) for n in (128, 512, 2048, 8192, 32000)],
    "PEs": [(n, Case(tp=n)) for n in (1, 2, 4, 8, 16)],
    "stages": [(n, Case(pp=n)) for n in (1, 2, 4, 8)],
    "replicas": [(n, Case(dp=n)) for n in (1, 2, 4)],
    "threads": [(n, Case(threads=n)) for n in (1, 2, 4)],
}
"""Factor -> its values, and what is run with each."""
LINEAR = ("layers", "hidden size, squared", "tokens")
"""Factors in which the time of decoding must be linear."""
_WITH_CONSTANT = ("layers", "hidden size, squared")
_NEXT_TO_NOTHING = Case(layers=1, hidden=64)
"""What a step takes besides the weights: the constant of the factors with one."""


def bars() -> Iterator[Bar]:
    """The exponent of the time of decoding in each factor, and beside it that of a prefill."""
    yield from bars_of(measured(tuple(FACTORS)), None, None)


def measured(names: Sequence[str]) -> Iterator[tuple[str, dict[int, Cost]]]:
    """The costs of the cases of these factors."""
    with tempfile.TemporaryDirectory() as folder:
        (constant,) = measure([_NEXT_TO_NOTHING], Path(folder))
        for name in names:
            values, cases = zip(*FACTORS[name], strict=True)
            costs = measure(cases, Path(folder))
            taken = constant if name in _WITH_CONSTANT else Cost(decode=0.0, prefill=0.0)
            yield name, {value: cost.without(taken) for value, cost in zip(values, costs, strict=True)}


def bars_of(found: Iterator[tuple[str, dict[int, Cost]]], plotted: Path | None, page: Path | None) -> Iterator[Bar]:
    """A bar for each factor; draws the plot, and puts the table into `page`, once all are there."""
    factors: dict[str, dict[int, Cost]] = {}
    for name, costs in found:
        factors[name] = costs
        yield bar(name, costs)
    if plotted is not None:
        plot(factors, plotted)
    if page is not None:
        put_into(page, "cost growth", table(factors))


def bar(name: str, costs: Mapping[int, Cost]) -> Bar:
    """The exponent in one factor: how far it is from 1 if it must be 1, else itself, without a limit."""
    decode, prefill = exponents(costs)
    ends = [f"{value}: {costs[value].decode:.2f} / {costs[value].prefill:.1f} ms" for value in (min(costs), max(costs))]
    beside = f"decode {decode:.3f}, prefill {prefill:.3f}; decode / prefill at {', '.join(ends)}"
    if name in LINEAR:
        return Bar(what=f"{name}: exponent's distance from 1", figure=abs(decode - 1), limit=_APART, beside=beside)
    return Bar(what=f"{name}: exponent", figure=decode, limit=None, beside=beside)


def table(factors: Mapping[str, Mapping[int, Cost]]) -> str:
    """A row for each factor: both exponents, and the times at both ends."""
    lines = [
        "| factor | exponent of decoding | bar | exponent of prefill | decoding, ms | prefill, ms |",
        "|---|---|---|---|---|---|",
    ]
    for name, costs in factors.items():
        decode, prefill = exponents(costs)
        low, high = min(costs), max(costs)
        ends = costs[low], costs[high]
        cells = [
            f"{name}, {low} to {high}",
            f"**{decode:.3f}**" if name in LINEAR else f"{decode:.3f}",
            f"1 +- {_APART}" if name in LINEAR else "",
            "" if name == "tokens" else f"{prefill:.3f}",
            " to ".join(f"{cost.decode:.1f}" for cost in ends),
            " to ".join(f"{cost.prefill:.0f}" for cost in ends),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def exponents(costs: Mapping[int, Cost]) -> tuple[float, float]:
    """Of decoding, and of prefill."""
    return (
        exponent({value: cost.decode for value, cost in costs.items()}),
        exponent({value: cost.prefill for value, cost in costs.items()}),
    )


def exponent(times: Mapping[int, float]) -> float:
    """The slope of the times over the values, both as logarithms."""
    return float(np.polyfit(np.log(list(times)), np.log(list(times.values())), 1)[0])


def measure(cases: Sequence[Case], folder: Path) -> list[Cost]:
    """The least of some rounds of each, on artifacts in `folder` that are built once; who is first changes."""
    with ExitStack() as stack:
        runs = [(case, _served(case, folder, stack)) for case in cases]
        found: list[list[Cost]] = [[] for _ in cases]
        for number in range(_LONG_ROUNDS if max(case.context for case in cases) > PAST else _ROUNDS):
            for index in range(len(runs))[:: 1 if number % 2 else -1]:
                case, served = runs[index]
                found[index].append(_round(served, case))
    return [
        Cost(decode=min(cost.decode for cost in rounds), prefill=min(cost.prefill for cost in rounds))
        for rounds in found
    ]


def _served(case: Case, folder: Path, stack: ExitStack) -> list[Served]:
    opened = open_artifact(_artifact(case, folder), full=False)
    stages = choose_stages(opened, pipeline_parallel_size=case.pp)
    host = stack.enter_context(Host(opened, stages, threads=case.threads))
    runners = [host.runner(slots_per_group=case.batch) for _ in range(case.dp)]
    for runner in runners:
        stack.callback(runner.close)
    return [Served(runner, rows=case.batch, logits="last") for runner in runners]


def _round(served: Sequence[Served], case: Case) -> Cost:
    def prefill() -> None:
        for one in served:
            one.prefill(case.context)

    def decode(count: int) -> None:
        for _ in range(count):
            for future in [one.start() for one in served]:
                future.result()

    took = _milliseconds(prefill)
    begun = time.perf_counter()
    decode(1)
    while time.perf_counter() - begun < case.warm:
        for one in served:
            one.rewind(case.context)
        decode(1)
    return Cost(prefill=took, decode=_milliseconds(lambda: decode(case.tokens)))


def _milliseconds(work: Callable[[], None]) -> float:
    started = time.process_time()
    work()
    return (time.process_time() - started) * 1e3


def _artifact(case: Case, folder: Path) -> Path:
    """Built from a synthetic model in genai's shape, of heads of 64 and a small vocabulary."""
    name = f"{case.layers}-{case.hidden}-{case.vocab}"
    model, artifact = folder / name, folder / f"{name}-tp{case.tp}"
    if not model.exists():
        heads = case.hidden // 32
        config = LlamaConfig(
            vocab_size=case.vocab,  # prompts count upwards: no fewer tokens than the context
            hidden_size=case.hidden,
            intermediate_size=4 * case.hidden,
            num_hidden_layers=case.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            head_dim=32,
            max_position_embeddings=1 << 15,
            rms_norm_eps=1e-5,
            rope_theta=1e4,
            tie_word_embeddings=False,
        )
        model.mkdir()
        fill(write_outline(model, config))
    if not artifact.exists():
        arguments = ["build", "--experimental-tp", "-tp", str(case.tp), str(model / "model.onnx"), str(artifact)]
        run_measured([sys.executable, "-c", _BUILD, *arguments])
    return artifact


def plot(found: Mapping[str, Mapping[int, Cost]], path: Path) -> None:
    """Times against each factor, on logarithmic axes, with a dotted line of exponent 1 through the first one."""
    import matplotlib as mpl  # slow to import, and wanted here alone

    mpl.use("Agg")
    from matplotlib import pyplot

    columns = min(3, len(found))
    rows = math.ceil(len(found) / columns)
    figure, grid = pyplot.subplots(rows, columns, figsize=(4 * columns, 3 * rows), layout="constrained", squeeze=False)
    for axes in grid.flat[len(found) :]:
        axes.set_visible(False)
    for axes, (name, costs) in zip(grid.flat, found.items(), strict=False):
        values = list(costs)
        for label, times in (
            ("decode", [c.decode for c in costs.values()]),
            ("prefill", [c.prefill for c in costs.values()]),
        ):
            (line,) = axes.loglog(values, times, marker="o", label=label)
            axes.loglog(values, [times[0] * v / values[0] for v in values], ":", color=line.get_color(), linewidth=0.8)
        axes.set_xticks(values, [str(value) for value in values], fontsize=7)
        axes.minorticks_off()
        axes.set_xlabel(name)
        axes.set_ylabel("ms of processor time")
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


@click.command()
@click.option("--only", "names", multiple=True, type=click.Choice(list(FACTORS)), help="One factor; may be repeated.")
@click.option("--write", is_flag=True, help=f"Draw {PLOT}, and put the table into {PAGE}; of all factors.")
def main(names: tuple[str, ...], write: bool) -> None:
    """Measure the growth with every factor, or with some, and fail if a bar is missed."""
    if write and names:
        raise click.UsageError("--write takes all factors; leave --only out")
    plotted, page = (PLOT, PAGE) if write else (None, None)
    sys.exit(0 if show(bars_of(measured(names or tuple(FACTORS)), plotted, page), Console(width=160)) else 1)


if __name__ == "__main__":
    main()
