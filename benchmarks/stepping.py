"""Sequences stepped on what serves and on plain onnxruntime, measured in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from typing import Protocol

import numpy as np

from benchmarks.artifacts import BuiltArtifact
from benchmarks.bars import Bar
from furiosa_llm.runtime.artifact.dtypes import Array
from furiosa_llm.runtime.artifact.reader import open_artifact
from furiosa_llm.runtime.execution.decoder import DecoderSession
from furiosa_llm.runtime.placement.stages import choose_stages
from furiosa_llm.runtime.placement.workload import DEFAULT_CHUNK_SIZE
from furiosa_llm.runtime.runners.batch import Decode, Piece, Prefill, Row, Runner, WantedLogits
from furiosa_llm.runtime.runners.local_runner import Host, LocalRunner
from furiosa_llm.runtime.verification.reference import ReferenceModel

THREADS = 2
PAST = 128
"""Tokens in front of the first decode step that is measured."""
_STEPS_PER_ROUND = 8
_TOKEN = 1

Times = dict[str, list[float]]
"""Who was measured -> milliseconds in each round."""


class Stepped(Protocol):
    """A batch of sequences that is prefilled, and stepped by a token each."""

    def prefill(self, count: int) -> None:
        """Forgets all and steps `count` tokens; the logits of every position are computed."""
        ...

    def decode(self) -> None:
        """Steps one token of each sequence."""
        ...


class Served:
    """Sequences in the first slots of one group of a replica's runner, which is what an engine steps."""

    def __init__(self, runner: Runner, *, rows: int = 1, group: int = 0, logits: WantedLogits = "all") -> None:
        self._runner = runner
        self._rows = rows
        self._group = group
        self._logits = logits
        self._length = 0

    def prefill(self, count: int) -> None:
        """Forgets all and steps `count` tokens of each sequence, in the chunks of an engine, one after another."""
        self._length = count
        for slot in range(self._rows):
            for start in range(0, count, DEFAULT_CHUNK_SIZE):
                piece = Piece(
                    sequence_id=slot,
                    slot=slot,
                    start=start,
                    tokens=tuple(range(start + 1, min(start + DEFAULT_CHUNK_SIZE, count) + 1)),
                    logits=self._logits,
                )
                self._runner.submit(Prefill(group=self._group, copies=(), pieces=(piece,))).result()

    def rewind(self, count: int) -> None:
        """Forgets what was stepped behind the first `count` tokens; states must lie in place."""
        self._length = count

    def start(self) -> Future[Array]:
        """Starts a step of one token of each sequence."""
        rows = tuple(Row(sequence_id=slot, start=self._length, token=_TOKEN) for slot in range(self._rows))
        self._length += 1
        return self._runner.submit(Decode(group=self._group, copies=(), rows=rows))

    def decode(self) -> None:
        """Steps one token of each sequence."""
        self.start().result()


class Plain:
    """One sequence on the unsplit model."""

    def __init__(self, session: DecoderSession) -> None:
        self._session = session

    def prefill(self, count: int) -> None:
        """Forgets all and steps `count` tokens."""
        self._session.reset()
        self._session.step(np.arange(1, count + 1, dtype=np.int64)[None, :])

    def decode(self) -> None:
        """Steps one token."""
        self._session.step(np.array([[_TOKEN]], dtype=np.int64))


def plain(built: BuiltArtifact, *, length: int) -> Plain:
    """The model of `built` in one session, with room for `length` tokens."""
    manifest = open_artifact(built.folder, full=False).manifest
    reference = ReferenceModel(
        built.model, inputs=manifest.inputs, outputs=manifest.outputs, states=manifest.states, threads=THREADS
    )
    session = DecoderSession(reference)
    session.reserve(length)
    return Plain(session)


@contextmanager
def replicas(built: BuiltArtifact, *, pipeline_parallel_size: int = 1) -> Iterator[Callable[[int], LocalRunner]]:
    """Loads the artifact in stages, and makes replicas of so many slots in each group, on threads of this process."""
    opened = open_artifact(built.folder, full=False)
    stages = choose_stages(opened, pipeline_parallel_size=pipeline_parallel_size)
    with Host(opened, stages, threads=THREADS) as host, ExitStack() as opened_runners:

        def make_runner(slots: int) -> LocalRunner:
            runner = host.runner(slots_per_group=slots)
            opened_runners.callback(runner.close)
            return runner

        yield make_runner


def decode_milliseconds(stepped: Stepped) -> float:
    """Of one decode step behind `PAST` tokens."""
    stepped.prefill(PAST)
    stepped.decode()
    started = time.perf_counter()
    for _ in range(_STEPS_PER_ROUND):
        stepped.decode()
    return (time.perf_counter() - started) / _STEPS_PER_ROUND * 1e3


def prefill_milliseconds(stepped: Stepped, count: int) -> float:
    """Of one prefill."""
    started = time.perf_counter()
    stepped.prefill(count)
    return (time.perf_counter() - started) * 1e3


def alternate(measures: Mapping[str, Callable[[], float]], rounds: int) -> Times:
    """What each measures in each round, after one that does not count; who goes first changes from round to round."""
    times: Times = {name: [] for name in measures}
    for measure in measures.values():
        measure()
    for number in range(rounds):
        for name in list(measures)[:: 1 if number % 2 else -1]:
            times[name].append(measures[name]())
    return times


def ratio(what: str, times: Times, ours: str, theirs: str, *, limit: float | None, beside: str = "") -> Bar:
    """The median over rounds of the ratio within a round."""
    ratios = [a / b for a, b in zip(times[ours], times[theirs], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    medians = f"{statistics.median(times[ours]):.1f} ms / {statistics.median(times[theirs]):.1f} ms"
    told = f"{medians}, quartiles {low:.2f} to {high:.2f}" + (f", {beside}" if beside else "")
    return Bar(what=what, figure=middle, limit=limit, unit="x", beside=told)
