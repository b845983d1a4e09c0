"""`python -m benchmarks.simulate.here`: this machine measured, predicted and benchmarked in turns; fails off the bar.

The bar is of the mean end-to-end latency of each of twelve runs, which has all of it: queue, prompts and tokens. In a
closed loop it is the inverse of the throughput. Each figure is the least of the rounds, as another's load only adds.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from benchmarks.artifacts import SYNTHETIC, SYNTHETIC_SMALL, artifact
from furiosa_llm.bench.load import run_load
from furiosa_llm.bench.metrics import Figures, figures_of
from furiosa_llm.bench.sweep import Load, Workload, plans_of
from furiosa_llm.bench.workload import arrivals, random_jobs
from furiosa_llm.runtime.engine.core import EngineCore
from furiosa_llm.runtime.engine.engine_args import EngineArgs
from furiosa_llm.runtime.engine.launch import Plan, start
from furiosa_llm.runtime.tokens.sampling_params import RequestOutputKind, SamplingParams
from furiosa_llm.simulate.device import Device
from furiosa_llm.simulate.predicted import Prediction
from furiosa_llm.simulate.this_machine import device_text, measure_this_machine

_MEDIAN, _WORST = 0.10, 0.25
_USERS = {1: 6, 4: 12, 16: 32}
"""Requests by how many are under way."""
_SHARES = (0.4, 0.7)
"""Of the requests a second that 16 users are predicted to get: the request rates."""
_OPEN = 24
_MODELS = {"genai-fp32": "SmolLM2", SYNTHETIC: "synthetic", SYNTHETIC_SMALL: "small synthetic"}
_TP = 4
_INPUT, _OUTPUT = 64, 32
_PARAMS = SamplingParams(temperature=0.0, ignore_eos=True, output_kind=RequestOutputKind.DELTA)
_LATENCIES = ("ttft", "tpot", "e2el")

Found = dict[tuple[str, str], dict[str, list[tuple[float, float]]]]
"""Model and load -> latency -> what was predicted and measured in each round, in milliseconds."""


def _workload(count: int, vocab_size: int) -> Workload:
    jobs = random_jobs(count, input_len=_INPUT, output_len=_OUTPUT, vocab_size=vocab_size)
    return Workload(jobs=jobs, params=_PARAMS, burstiness=1.0, seed=0, warmups=0, objectives={})


def _loads(plan: Plan, prediction: Prediction, name: str, rates: dict[str, list[float]], timed: bool) -> Iterator[Load]:
    """Closed loops, and where time passes while nothing runs two rates, which are the same in all rounds."""
    users = (1, 16) if name == SYNTHETIC_SMALL else tuple(_USERS)
    yield from (Load(concurrency=n) for n in users)
    if name != SYNTHETIC_SMALL and timed:
        if name not in rates:
            full = prediction.figures(plan, Load(concurrency=16), _workload(_USERS[16], 2))
            assert full is not None
            rates[name] = [float(f"{share * full.request_throughput:.2g}") for share in _SHARES]
        yield from (Load(request_rate=rate) for rate in rates[name])


def _measured(core: EngineCore, load: Load, workload: Workload, *, timed: bool) -> Figures:
    due = None
    if math.isfinite(load.request_rate):
        due = arrivals(len(workload.jobs), load.request_rate)
    clock = time.perf_counter if timed else time.process_time
    return figures_of(run_load(core, workload.jobs, _PARAMS, due=due, concurrency=load.concurrency, clock=clock), {})


def _round(device: Device, found: Found, rates: dict[str, list[float]], *, timed: bool) -> None:
    for name, title in _MODELS.items():
        folder = artifact(name, _TP).folder
        args = EngineArgs(folder, data_parallel_size=1, threads=None if timed else 1, enable_prefix_caching=False)
        ((_, plan),) = plans_of(args, [(1, 1)])
        prediction = Prediction(device, args)
        vocab_size = plan.limits.vocab_size or 2
        core = start(plan, args)
        try:
            _measured(core, Load(concurrency=4), _workload(4, vocab_size), timed=timed)
            for load in _loads(plan, prediction, name, rates, timed):
                workload = _workload(_USERS.get(load.concurrency or 0, _OPEN), vocab_size)
                said, was = prediction.figures(plan, load, workload), _measured(core, load, workload, timed=timed)
                assert said is not None
                for latency in _LATENCIES:
                    pair = getattr(said, latency).mean, getattr(was, latency).mean
                    found[title, str(load)][latency].append(pair)
        finally:
            core.close()


def _errors(found: Found) -> dict[tuple[str, str], dict[str, tuple[float, float]]]:
    """The least of the rounds, predicted and measured."""
    return {
        run: {name: (min(p for p, _ in pairs), min(m for _, m in pairs)) for name, pairs in latencies.items()}
        for run, latencies in found.items()
    }


@click.command()
@click.option("--rounds", default=2, show_default=True, help="How often each is measured.")
@click.option("--processor-time", is_flag=True,
              help="One core, in processor time, without request rates: for a machine that others use.")  # fmt: skip
@click.option("--output", type=click.Path(path_type=Path), help="Keep the last round's device file.")
def main(rounds: int, processor_time: bool, output: Path | None) -> None:
    """Compare predictions of this machine with benchmarks of it."""
    began, rates = time.monotonic(), dict[str, list[float]]()
    found: Found = defaultdict(lambda: defaultdict(list))
    for _ in range(rounds):
        device = measure_this_machine(processor_time=processor_time)
        _round(device, found, rates, timed=not processor_time)
    if output is not None:
        output.write_text(device_text(device))
    table = Table(title="means in ms: predicted, measured and error", title_justify="left")
    for column in ("model", "load", *(name.upper() for name in _LATENCIES)):
        table.add_column(column, justify="left" if column in ("model", "load") else "right")
    errors = _errors(found)
    for run, latencies in errors.items():
        cells = (f"{said:.1f} {was:.1f} {said / was - 1:+.0%}" for said, was in latencies.values())
        table.add_row(*run, *cells)
    console = Console(width=120)
    console.print(table)
    sizes = sorted(abs(said / was - 1) for said, was in (latencies["e2el"] for latencies in errors.values()))
    median = statistics.median(sizes)
    missed = median > _MEDIAN or sizes[-1] > _WORST
    console.print(
        f"{'MISSED' if missed else 'ok'} E2EL of {len(sizes)} runs: median {median:.1%}, bar {_MEDIAN:.0%}; worst "
        f"{sizes[-1]:.1%}, bar {_WORST:.0%}; {time.monotonic() - began:.0f} s"
    )
    sys.exit(missed)


if __name__ == "__main__":
    main()
