"""How processor time grows with what a model and a request have more of: exponents, and a plot of each factor."""

from __future__ import annotations

import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.artifacts import run_measured
from benchmarks.bars import Bar
from benchmarks.stepping import PAST, THREADS, Served
from fixtures.filled import fill
from fixtures.outline import write_outline
from furiosa_llm.example.llama.config import LlamaConfig
from furiosa_llm.runtime.artifact.reader import open_artifact
from furiosa_llm.runtime.placement.stages import choose_stages
from furiosa_llm.runtime.runners.local_runner import Host

PLOT = Path("docs/cost-growth.png")
_ROUNDS, _STEPS = 5, 8
_APART = 0.05
"""How far an exponent may be from the one that is expected."""
_BUILD = "import sys; from furiosa_llm.cli.main import main; main()"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is run: a decoder of `layers` and a `hidden` size on some PEs, stages, replicas and threads.

    Its weights are more than processors keep in their caches, or few layers would be faster than many, each.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Milliseconds of processor time: of all decode steps, and of the prefill of all prompts."""

    decode: float
    prefill: float


FACTORS: Mapping[str, Sequence[tuple[int, Case]]] = {
    "layers": [(n, Case(layers=n)) for n in (8, 16, 24, 32)],
    "hidden size, squared": [(n * n, Case(hidden=n, layers=2)) for n in (1024, 1536, 2048, 3072)],
    "tokens": [(n, Case(tokens=n)) for n in (32, 64, 128, 256)],
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


def bars() -> Iterator[Bar]:
    """The exponent of the time of decoding in each factor, and beside it that of a prefill; draws the plot."""
    found: dict[str, dict[int, Cost]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, cases in FACTORS.items():
            found[name] = {value: measure(case, Path(folder)) for value, case in cases}
            yield bar(name, found[name])
    plot(found, PLOT)


def bar(name: str, costs: Mapping[int, Cost]) -> Bar:
    """The exponent in one factor: how far it is from 1 if it must be 1, else itself, without a limit."""
    decode = exponent({value: cost.decode for value, cost in costs.items()})
    prefill = exponent({value: cost.prefill for value, cost in costs.items()})
    ends = [f"{value}: {costs[value].decode:.2f} / {costs[value].prefill:.1f} ms" for value in (min(costs), max(costs))]
    beside = f"decode {decode:.3f}, prefill {prefill:.3f}; decode / prefill at {', '.join(ends)}"
    if name in LINEAR:
        return Bar(what=f"{name}: exponent's distance from 1", figure=abs(decode - 1), limit=_APART, beside=beside)
    return Bar(what=f"{name}: exponent", figure=decode, limit=None, beside=beside)


def exponent(times: Mapping[int, float]) -> float:
    """The slope of the times over the values, both as logarithms."""
    return float(np.polyfit(np.log(list(times)), np.log(list(times.values())), 1)[0])


def measure(case: Case, folder: Path) -> Cost:
    """The least of some rounds, on an artifact in `folder` that is built once."""
    opened = open_artifact(_artifact(case, folder), full=False)
    stages = choose_stages(opened, pipeline_parallel_size=case.pp)
    with Host(opened, stages, threads=case.threads) as host:
        runners = [host.runner(slots_per_group=case.batch) for _ in range(case.dp)]
        served = [Served(runner, rows=case.batch, logits="last") for runner in runners]
        rounds = [_round(served, case) for _ in range(1 if case.context > PAST else _ROUNDS)]
        for runner in runners:
            runner.close()
    return Cost(decode=min(cost.decode for cost in rounds), prefill=min(cost.prefill for cost in rounds))


def _round(served: Sequence[Served], case: Case) -> Cost:
    def prefill() -> None:
        for one in served:
            one.prefill(case.context)

    def decode(count: int) -> None:
        for _ in range(count):
            for future in [one.start() for one in served]:
                future.result()

    took = _milliseconds(prefill)
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
