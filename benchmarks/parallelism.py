"""What pipeline stages, replicas and worker processes cost: on the same cores, alternated."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from benchmarks import many_pes, second_replica
from benchmarks.artifacts import artifact
from benchmarks.bars import Bar
from benchmarks.parity import PROMPTS
from benchmarks.stepping import PAST, Served, alternate, decode_milliseconds, ratio, replicas
from furiosa_llm.runtime.artifact.reader import open_artifact
from furiosa_llm.runtime.placement.stages import choose_stages
from furiosa_llm.runtime.runners.batch import Decode, Piece, Prefill, Row, Runner
from furiosa_llm.runtime.runners.process_runner import ProcessHost
from furiosa_llm.runtime.tokens.tokenizer import Tokenizer

MODEL = "genai-fp32"
_ROUNDS = 20
_STEPS = 8
_STAGES = _ROWS = 2
"""Two stages, and two requests in each of the two micro-batches."""
_WORKERS = 2
_TOKENS = 64


def bars() -> Iterator[Bar]:
    """Stages, then worker processes, then the memory of a second replica, then 32 PEs."""
    for size in (4, 8):
        yield from _pipeline(size)
    yield from _workers(8)
    yield from second_replica.bars(MODEL, 4)
    yield from many_pes.bars(MODEL)


# -- pipeline ------------------------------------------------------------------------------------------------------


class StagedRunner(Runner, Protocol):
    """A runner that says how long each of its stages has been running."""

    @property
    def busy_seconds(self) -> list[float]:
        """How long each stage has been running."""
        ...


@dataclass(slots=True)
class Bubbles:
    """What the stages of a pipeline did: their seconds in all rounds, and those of the rounds."""

    stages: int
    busy: float = 0.0
    wall: float = 0.0

    @property
    def share(self) -> float:
        """Of the stages' time in which they had nothing to do."""
        return 1 - self.busy / (self.stages * self.wall)


def _pipeline(size: int) -> Iterator[Bar]:
    """Two micro-batches under way in two stages against the same ones stepped in turn in one stage."""
    built = artifact(MODEL, size)
    bubbles = Bubbles(stages=_STAGES)
    with replicas(built, pipeline_parallel_size=_STAGES) as make_staged, replicas(built) as make_whole:
        runner = make_staged(_ROWS)
        batch = 2 * _ROWS
        sides = {
            "pp=2": partial(pipelined_milliseconds, runner, bubbles),
            "pp=1": partial(turns_milliseconds, [Served(make_whole(_ROWS), rows=_ROWS) for _ in range(_STAGES)]),
            "batch": partial(turns_milliseconds, [Served(make_whole(batch), rows=batch)]),
        }
        times = alternate(sides, _ROUNDS)
    what = f"{MODEL} tp {size}: decode of {batch} requests, pp=2 /"
    beside = f"bubbles {bubbles.share:.1%}"
    yield ratio(f"{what} pp=1, both {_STAGES} micro-batches", times, "pp=2", "pp=1", limit=1.1, beside=beside)
    yield ratio(f"{what} pp=1, one batch", times, "pp=2", "batch", limit=None)


def turns_milliseconds(micro_batches: Sequence[Served]) -> float:
    """Of one step of each micro-batch, one after the other."""
    for one in micro_batches:
        one.prefill(PAST)
        one.decode()
    started = time.perf_counter()
    for _ in range(_STEPS):
        for one in micro_batches:
            one.decode()
    return (time.perf_counter() - started) / _STEPS * 1e3


def pipelined_milliseconds(runner: StagedRunner, bubbles: Bubbles) -> float:
    """Of one step of each micro-batch, one under way in every group all the time: a full pipeline, not its ends."""
    micro_batches = [Served(runner, rows=_ROWS, group=group) for group in range(runner.num_groups)]
    for one in micro_batches:
        one.prefill(PAST)
    under_way = [one.start() for one in micro_batches]
    for step in range(_STEPS + 1):
        for group, one in enumerate(micro_batches):
            under_way[group].result()
            under_way[group] = one.start()
        if step == 0:
            started, busy = time.perf_counter(), sum(runner.busy_seconds)
    wall = time.perf_counter() - started
    bubbles.wall += wall
    bubbles.busy += sum(runner.busy_seconds) - busy
    for future in under_way:
        future.result()
    return wall / _STEPS * 1e3


# -- workers -------------------------------------------------------------------------------------------------------


def _workers(size: int) -> Iterator[Bar]:
    """PEs in processes against PEs on threads, one runner of each, which take turns."""
    built = artifact(MODEL, size)
    opened = open_artifact(built.folder, full=False)
    processes = ProcessHost(opened, choose_stages(opened), workers=_WORKERS)
    tokenizer = Tokenizer.from_artifact(opened)
    with replicas(built) as make_runner, closing(processes.runner(slots_per_group=1)) as workers:
        runners: dict[str, Runner] = {"workers": workers, "threads": make_runner(1)}
        sides = {name: partial(decode_milliseconds, Served(runner)) for name, runner in runners.items()}
        times = alternate(sides, _ROUNDS)
        found = {name: greedy_tokens(runner, tokenizer.encode(PROMPTS[1])) for name, runner in runners.items()}
    what = f"{MODEL} tp {size}: decode step, past {PAST}, {_WORKERS} workers / threads"
    yield ratio(what, times, "workers", "threads", limit=1.15)
    differing = sum(a != b for a, b in zip(found["workers"], found["threads"], strict=True))
    what = f"{MODEL} tp {size}: tokens that differ between {_WORKERS} workers and threads"
    yield Bar(what=what, figure=differing, limit=0, beside=f"of {_TOKENS}, greedy")


def greedy_tokens(runner: Runner, prompt: Sequence[int], count: int = _TOKENS) -> list[int]:
    """The likeliest `count` tokens behind `prompt`."""
    piece = Piece(sequence_id=0, slot=0, start=0, tokens=tuple(prompt), logits="last")
    tokens = [int(runner.submit(Prefill(group=0, copies=(), pieces=(piece,))).result()[-1].argmax())]
    while len(tokens) < count:
        row = Row(sequence_id=0, start=len(prompt) + len(tokens) - 1, token=tokens[-1])
        logits = runner.submit(Decode(group=0, copies=(), rows=(row,))).result()
        tokens.append(int(logits[0].argmax()))
    return tokens
