"""What threads, cores and spinning make of a decode step, alone and beside another: `python -m benchmarks.threads`.

Cores are taken away by the affinity of the threads, as `taskset` does it, so that what one core does is measured here.
"""

from __future__ import annotations

import itertools
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import click
from rich.console import Console

from benchmarks.artifacts import artifact
from benchmarks.bars import Bar, put_into, show
from benchmarks.stepping import PAST, Served
from furiosa_llm.runtime.artifact.reader import open_artifact
from furiosa_llm.runtime.placement.stages import choose_stages
from furiosa_llm.runtime.runners.local_runner import Host

PAGE = Path("docs/threads.md")
_MODELS, _SIZE = ("genai-fp32", "int4"), 4
_SPINS = (0, 50, 1000)
"""Microseconds."""
_PLACES = ((1, 1), (1, 2), (2, 1), (2, 2))
"""Cores, and threads."""
_ROUNDS, _STEPS = 6, 12
_SLOWER_ALONE, _SLOWER_BESIDE = 1.1, 1.0
"""The time of the default, which is not to spin, over that of the fastest spinning, at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Whose steps are run how: on how many cores and threads, spinning for so long, alone or beside a busy process."""

    model: str
    cores: int
    threads: int
    spin_us: int
    busy: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Took:
    """Milliseconds of a step, on the wall and of processor time."""

    wall: float
    processor: float


def measure(models: Sequence[str], size: int) -> dict[Setting, Took]:
    """The medians of some rounds, in which all settings take turns."""
    found: dict[Setting, list[Took]] = defaultdict(list)
    cores = sorted(os.sched_getaffinity(0))
    with ExitStack() as stack:
        settings = [
            Setting(model=model, cores=count, threads=threads, spin_us=spin_us, busy=False)
            for model in models
            for count, threads in _PLACES
            for spin_us in (_SPINS if threads > 1 else (0,))
            if count <= len(cores)
        ]
        served = {setting: _serving(setting, size, cores, stack) for setting in settings}
        for number in range(_ROUNDS):
            for busy in (False, True)[:: 1 if number % 2 else -1]:
                with busy_process(cores[0]) if busy else nullcontext():
                    for setting, one in served.items():
                        found[replace(setting, busy=busy)].append(_round(one))
    return {
        setting: Took(
            wall=statistics.median(one.wall for one in rounds),
            processor=statistics.median(one.processor for one in rounds),
        )
        for setting, rounds in found.items()
    }


def _serving(setting: Setting, size: int, cores: Sequence[int], stack: ExitStack) -> Served:
    """What is stepped, on threads that may use so many of these cores."""
    opened = open_artifact(artifact(setting.model, size).folder, full=False)
    with on_cores(cores[: setting.cores]):
        host = stack.enter_context(
            Host(opened, choose_stages(opened), threads=setting.threads, spin_us=setting.spin_us)
        )
        runner = host.runner(slots_per_group=1)
    stack.callback(runner.close)
    return Served(runner, logits="last")


@contextmanager
def on_cores(cores: Sequence[int]) -> Iterator[None]:
    """Threads that are made in the block have these cores alone."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def busy_process(core: int) -> Iterator[None]:
    """A process that computes on that core."""
    with on_cores([core]):
        process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def _round(served: Served) -> Took:
    served.prefill(PAST)
    served.decode()
    wall, processor = time.perf_counter(), time.process_time()
    for _ in range(_STEPS):
        served.decode()
    return Took(
        wall=(time.perf_counter() - wall) / _STEPS * 1e3, processor=(time.process_time() - processor) / _STEPS * 1e3
    )


def bars(found: Mapping[Setting, Took]) -> Iterator[Bar]:
    """What the default, not to spin, costs and gains where there is a core for each thread."""
    cores = max(setting.cores for setting in found)
    limits = {False: _SLOWER_ALONE, True: _SLOWER_BESIDE}
    for model, busy in itertools.product(dict.fromkeys(setting.model for setting in found), limits):
        walls = {
            setting.spin_us: took.wall
            for setting, took in found.items()
            if (setting.model, setting.cores, setting.threads, setting.busy) == (model, cores, cores, busy)
            and cores > 1
        }
        if walls:
            fastest = min((spin_us for spin_us in walls if spin_us), key=walls.__getitem__)
            where = "beside a busy process" if busy else "alone"
            what = f"{model}, {cores} threads {where}: no spinning / {fastest} us"
            beside = f"{walls[0]:.1f} ms / {walls[fastest]:.1f} ms"
            yield Bar(what=what, figure=walls[0] / walls[fastest], limit=limits[busy], unit="x", beside=beside)


def table(found: Mapping[Setting, Took]) -> str:
    """A row for each model, cores, threads and spinning."""
    lines = [
        "| model | cores | threads | spin_us | wall, processor: alone | beside a busy process |",
        "|---|---|---|---|---|---|",
    ]
    for setting in sorted({replace(setting, busy=False) for setting in found}, key=astuple):
        both = [found[replace(setting, busy=busy)] for busy in (False, True)]
        cells = [f"{took.wall:.1f}, {took.processor:.1f} ms" for took in both]
        of = (setting.model, setting.cores, setting.threads, setting.spin_us)
        lines.append(f"| {' | '.join(map(str, of))} | {' | '.join(cells)} |")
    return "\n".join(lines)


@click.command()
@click.option("--write", is_flag=True, help=f"Put the table into {PAGE}.")
def main(write: bool) -> None:
    """Measure every setting, print the table, and fail if a bar is missed."""
    found = measure(_MODELS, _SIZE)
    print(table(found))
    if write:
        put_into(PAGE, "threads", table(found))
    sys.exit(0 if show(bars(found), Console(width=140)) else 1)


if __name__ == "__main__":
    main()
