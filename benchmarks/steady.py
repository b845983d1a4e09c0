"""What a decode step of an engine costs outside onnxruntime, part by part: `python -m benchmarks.steady`.

Requests are decoded by an engine, with texts and outputs, while clocks stand around the functions that a step is made
of. Of a function's time the functions that it calls are taken off if they have clocks of their own; what several
threads do at once counts by the mean of them. So the parts add up to the step, from one batch's submission to the
next, but for a rest: what the replica's thread does outside these functions. The same is done with clocks of the
threads' processor time, which counts for all threads, and which other programs disturb less. Figures are means over
the cheaper half of the steps.
"""

from __future__ import annotations

import statistics
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from time import perf_counter, process_time, thread_time
from typing import Any
from unittest import mock

import click
from rich.console import Console

from benchmarks.artifacts import artifact
from benchmarks.bars import Bar, put_into, show
from benchmarks.parity import PROMPTS
from benchmarks.stepping import THREADS
from furiosa_llm import EngineArgs, SamplingParams
from furiosa_llm.runtime.artifact.dtypes import Array
from furiosa_llm.runtime.engine.core import EngineCore
from furiosa_llm.runtime.engine.launch import load_engine
from furiosa_llm.runtime.engine.replica import Replica
from furiosa_llm.runtime.engine.scheduler import Scheduler
from furiosa_llm.runtime.execution import binding
from furiosa_llm.runtime.execution.binding import BoundProgram
from furiosa_llm.runtime.execution.driver import Barrier, Crew
from furiosa_llm.runtime.requests import request_table
from furiosa_llm.runtime.requests.outputs import RequestOutput
from furiosa_llm.runtime.requests.prompts import Prompt
from furiosa_llm.runtime.requests.request_table import RequestTable
from furiosa_llm.runtime.runners.batch import Batch, Decode
from furiosa_llm.runtime.runners.local_runner import LocalRunner
from furiosa_llm.runtime.runners.steps import GroupRunner, StageBuffers
from furiosa_llm.runtime.tokens.sampling_params import RequestOutputKind
from furiosa_llm.runtime.tokens.text_stream import TextStream

PAGE = Path("docs/steady-state.md")
MODELS = [(model, size) for model in ("int4", "genai-fp32") for size in (4, 8)]
_TOKENS = {1: 128, 16: 48}
"""By batch: the tokens of a completion."""
_CALIBRATED, _CALLS = 50, 400
_LARGEST_OUTSIDE = 0.15
"""The share of a step's processor time that may be spent around onnxruntime."""
_LARGEST_REST = 0.02
"""The share of a step that may be in none of the parts."""

CALLS, WAITS, SUMS, LANES = "onnxruntime", "waiting for other lanes", "sums between lanes", "stepping lanes"
THREADING, BINDING, STEPS = "threads: start and end", "feeds and binding", "batch to steps, logits"
SCHEDULING, SAMPLING, TEXT, BOOKKEEPING = "scheduling", "sampling", "detokenising", "bookkeeping of requests"
HANDOVER, OWN, REST = "hand-over between threads", "these clocks", "in no part"
BESIDE = "outputs, while the next step runs"
CLOCKS: Sequence[tuple[Any, str, str]] = (
    (BoundProgram, "_run_segment", CALLS),
    (Barrier, "wait", WAITS),
    (binding, "run_operations", SUMS),
    (BoundProgram, "_drive", LANES),
    (Crew, "run", THREADING),
    (StageBuffers, "use", BINDING),
    (GroupRunner, "run", STEPS),
    (Scheduler, "schedule", SCHEDULING),
    (Scheduler, "complete", SCHEDULING),
    (request_table, "sample_rows", SAMPLING),
    (TextStream, "push", TEXT),
    (RequestTable, "accept", BOOKKEEPING),
    (Replica, "_finish", BOOKKEEPING),
    (RequestTable, "deliver", BESIDE),
)
"""Whose function, its name, and the part that its time counts for."""
LANE_PARTS = (CALLS, WAITS, SUMS, LANES, OWN)
"""Of every thread that steps lanes."""
PARTS = (*dict.fromkeys(part for _, _, part in CLOCKS if part != BESIDE), HANDOVER, OWN, REST)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Milliseconds of a decode step, of all of it and of each part."""

    total: float
    parts: Mapping[str, float]


class _Nothing:
    @staticmethod
    def happens() -> None: ...


class Profile:
    """Clocks around functions, and what they showed of each step of `rows` rows that another one followed.

    They are clocks on the wall, or with `processor` of the processor time.
    """

    def __init__(self, rows: int, *, processor: bool) -> None:
        self.steps: list[Step] = []
        self._rows = rows
        self._processor = processor
        self._clock, self._clock_of_all = (thread_time, process_time) if processor else (perf_counter, perf_counter)
        self._spent: list[dict[str, float]] = []
        self._local = threading.local()
        self._submitted: float | None = None
        self._times: dict[str, tuple[float, float]] = {}
        self._beside = 0.0
        self._finished = 0
        self._cost = 0.0
        self._cost = self._cost_of_a_clock()

    def _cost_of_a_clock(self) -> float:
        """Seconds that a clock takes of whoever calls its function, beyond those that it shows: the least of some."""
        clocked = self._clocked(_Nothing, "happens", REST)
        found = []
        for _ in range(_CALIBRATED):
            started = self._clock()
            for _ in range(_CALLS):
                clocked()
            found.append((self._clock() - started - self._spent[0].pop(REST)) / _CALLS)
        self._spent.clear()
        self._local = threading.local()
        return min(found)

    @contextmanager
    def clocks(self) -> Iterator[None]:
        """Stand around the functions while the block runs."""
        with ExitStack() as stack:
            for owner, name, part in CLOCKS:
                stack.enter_context(mock.patch.object(owner, name, self._clocked(owner, name, part)))
            submit = LocalRunner.submit

            def submitted(runner: LocalRunner, batch: Batch) -> Future[Array]:
                self._mark(batch)
                return submit(runner, batch)

            stack.enter_context(mock.patch.object(LocalRunner, "submit", submitted))
            yield

    def _clocked(self, owner: Any, name: str, part: str) -> Callable[..., Any]:
        function, local, clock = getattr(owner, name), self._local, self._clock
        noted = {(GroupRunner, "run"): "run", (Replica, "_finish"): "finish"}.get((owner, name))

        def clocked(*arguments: Any) -> Any:
            if not hasattr(local, "spent"):
                local.spent, local.inner = defaultdict(float), 0.0
                self._spent.append(local.spent)
            if noted == "finish":
                self._take_what_is_beside(local.spent)
            outer, local.inner = local.inner, 0.0
            started = clock()
            try:
                return function(*arguments)
            finally:
                ended = clock()
                local.spent[part] += ended - started - local.inner
                local.spent[OWN] += self._cost
                local.inner = outer + ended - started + self._cost
                if noted is not None:
                    self._times[noted] = (started, ended)

        return clocked

    def _take_what_is_beside(self, spent: dict[str, float]) -> None:
        """What the replica's thread has done while the batch ran: no part of the step on the wall."""
        self._finished += 1
        self._beside = sum(spent.values())
        spent.clear()

    def _mark(self, batch: Batch) -> None:
        """Ends a step and begins the next one."""
        now = self._clock_of_all()
        full = isinstance(batch, Decode) and len(batch.rows) == self._rows
        if full and self._submitted is not None and self._finished == 1:
            parts = {part: sum(spent[part] for spent in self._spent) for part in PARTS}
            if not self._processor:
                self._put_on_the_wall(parts, self._submitted)
            self.steps.append(self._step(parts, now - self._submitted))
        for spent in self._spent:
            spent.clear()
        self._finished = 0
        self._submitted = now if full else None

    def _put_on_the_wall(self, parts: dict[str, float], submitted: float) -> None:
        """Takes the mean of the threads that step lanes, and adds what passes between two threads."""
        members = [spent for spent in self._spent if spent[CALLS]]
        for part in LANE_PARTS:
            of_members = [spent[part] for spent in members]
            parts[part] += statistics.fmean(of_members) - sum(of_members)
        own = max(members, key=lambda spent: spent[THREADING])
        lanes = [sum(spent[part] for part in LANE_PARTS) for spent in (own, *members)]
        parts[THREADING] += lanes[0] - statistics.fmean(lanes[1:])
        (begun, given_back), (taken, _) = self._times["run"], self._times["finish"]
        parts[HANDOVER] = begun - submitted + taken - given_back

    def _step(self, parts: dict[str, float], total: float) -> Step:
        if self._processor:
            parts[BESIDE] = self._beside
        parts[REST] = total - sum(parts.values())
        in_ms = {part: seconds * 1e3 for part, seconds in {**parts, BESIDE: self._beside}.items()}
        return Step(total=total * 1e3, parts=in_ms)


def profiles(model: str, size: int) -> Iterator[tuple[str, bool, Step]]:
    """A step of each batch, by its name, on the wall and in processor time."""
    folder, most = artifact(model, size).folder, max(_TOKENS)
    args = EngineArgs(folder, threads=THREADS, max_batch_size=most, enable_prefix_caching=False)
    with closing(load_engine(args)) as core:
        for batch, tokens in _TOKENS.items():
            for processor in (False, True):
                step = profile(core, PROMPTS[:batch], tokens, processor=processor)
                yield f"{model}, tp {size}, batch {batch}", processor, step


def profile(core: EngineCore, prompts: Sequence[Prompt], tokens: int, *, processor: bool) -> Step:
    """A step of these prompts, by the clock on the wall or in processor time."""
    found = Profile(len(prompts), processor=processor)
    with found.clocks():
        _serve(core, prompts, tokens)
    return mean_of_cheaper_half(found.steps)


def mean_of_cheaper_half(steps: Sequence[Step]) -> Step:
    """Of the parts, too, which still add up."""
    cheaper = sorted(steps, key=lambda step: step.total)[: max(1, len(steps) // 2)]
    parts = {part: statistics.fmean(step.parts[part] for step in cheaper) for part in (*PARTS, BESIDE)}
    return Step(total=statistics.fmean(step.total for step in cheaper), parts=parts)


def _serve(core: EngineCore, prompts: Sequence[Prompt], tokens: int) -> None:
    """Completes `prompts`, as a server does: greedily, with the text of every token."""
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=tokens, output_kind=RequestOutputKind.DELTA)
    ready: SimpleQueue[Sequence[tuple[int, RequestOutput]]] = SimpleQueue()
    for number, prompt in enumerate(prompts):
        core.submit(str(number), prompt, params, ready.put)
    left = len(prompts)
    while left:
        left -= sum(output.finished for _, output in ready.get())


def bars(found: Mapping[bool, Mapping[str, Step]]) -> Iterator[Bar]:
    """What of each step is not onnxruntime's, and what is in no part; `found` by whether it is processor time."""
    for processor, steps in found.items():
        how = "processor time" if processor else "on the wall"
        for name, step in steps.items():
            outside = 1 - (step.parts[CALLS] + step.parts[OWN]) / step.total
            beside = (
                f"{step.parts[CALLS]:.2f} of {step.total:.2f} ms are onnxruntime's, {step.parts[OWN]:.2f} the clocks'"
            )
            limit = _LARGEST_OUTSIDE if processor else None
            yield Bar(what=f"{name}, {how}: outside onnxruntime", figure=outside, limit=limit, beside=beside)
            rest = abs(step.parts[REST]) / step.total
            yield Bar(what=f"{name}, {how}: in no part", figure=rest, limit=_LARGEST_REST)


def table(steps: Mapping[str, Step], *, processor: bool) -> str:
    """A row for each part, in ms and as a share of the step, a column for each case."""
    parts = (*(part for part in PARTS if part != HANDOVER), BESIDE) if processor else PARTS
    lines = [f"| ms of {'processor time' if processor else 'the clock'} | {' | '.join(steps)} |"]
    lines.append(f"|---|{'---|' * len(steps)}")
    for part in sorted(parts, key=lambda part: -max(step.parts[part] / step.total for step in steps.values())):
        cells = [f"{step.parts[part]:.2f} ({step.parts[part] / step.total:.1%})" for step in steps.values()]
        lines.append(f"| {part} | {' | '.join(cells)} |")
    lines.append(f"| **the step** | {' | '.join(f'**{step.total:.2f}**' for step in steps.values())} |")
    return "\n".join(lines)


@click.command()
@click.option("--write", is_flag=True, help=f"Put the tables into {PAGE}.")
def main(write: bool) -> None:
    """Measure every case, print the tables, and fail if a bar is missed."""
    found: dict[bool, dict[str, Step]] = {False: {}, True: {}}
    for model, size in MODELS:
        for name, processor, step in profiles(model, size):
            found[processor][name] = step
    text = "\n\n".join(table(steps, processor=processor) for processor, steps in found.items())
    print(text)
    if write:
        put_into(PAGE, "steady state", text)
    sys.exit(0 if show(bars(found), Console(width=140)) else 1)


if __name__ == "__main__":
    main()
