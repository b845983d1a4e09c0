"""What the head of a cluster spends, and how many hosts one head is enough for: `make bench-head`; fails off its bars.

The head is this process: scheduler, messages, tokens, outputs. Stages are servers in processes of their own, of a model
whose steps take no time. Figures are processor time, and the least of a few rounds: another's load only adds.
"""

from __future__ import annotations

import itertools
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
from rich.console import Console

from benchmarks.artifacts import SYNTHETIC_TINY
from benchmarks.artifacts import artifact as built
from benchmarks.bars import Bar, show
from benchmarks.cluster import TOKEN, server
from furiosa_llm.runtime.artifact.reader import Artifact, open_artifact
from furiosa_llm.runtime.distributed.remote_host import Place, RemoteHost
from furiosa_llm.runtime.distributed.remote_runner import RemoteRunner
from furiosa_llm.runtime.engine.core import EngineCore
from furiosa_llm.runtime.engine.engine_args import EngineArgs
from furiosa_llm.runtime.engine.launch import Plan, make_plan
from furiosa_llm.runtime.engine.replica import Replica
from furiosa_llm.runtime.execution.counters import stage_counts
from furiosa_llm.runtime.requests.outputs import RequestOutput
from furiosa_llm.runtime.tokens.sampling_params import SamplingParams

_SHAPES = tuple(itertools.product((1, 2, 4), (1, 4, 16)))
"""Stages, and rows of a batch."""
_TOKENS = 96
_ROUNDS = 3
_REPORTED = 1.6
"""Seconds after which stages have told their counters."""
_IDLE_SECONDS = 4.0
_OFF = 0.25
"""By how much a measured batch may be off from the model of all."""
_STAGE_SECONDS, _ROWS = 0.020, 16
_HOSTS = ((16, 1), (16, 4), (64, 1), (64, 4), (256, 4), (256, 16))
"""Hosts, and stages of a replica, one on each host."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """The seconds of a core that a batch takes of the head, and the share of one that a stage takes while it idles."""

    batch: float
    stage: float
    """Of each stage of the batch beyond the first."""
    row: float
    idle: float

    def seconds(self, stages: int, rows: int) -> float:
        """Of a batch."""
        return self.batch + self.stage * (stages - 1) + self.row * rows

    def cores(self, hosts: int, stages: int) -> float:
        """Of `hosts` that are busy: a replica has a batch for each stage on its way, and ends one each stage's time."""
        replicas = hosts // stages
        return replicas * self.seconds(stages, _ROWS) / _STAGE_SECONDS + hosts * self.idle

    def most_replicas(self, stages: int) -> float:
        """For which one core is enough."""
        return 1 / self.cores(stages, stages)


class _Servers:
    """A `Cluster` of servers that run."""

    own_address = "127.0.0.1"
    token = TOKEN

    def __init__(self, addresses: Sequence[str]) -> None:
        self._places = [Place(address=one, host=f"process {number}") for number, one in enumerate(addresses)]
        self.card_hosts = [one.host for one in self._places]

    def places(self, replica: int) -> Sequence[Place]:  # noqa: ARG002 - there is one replica
        return self._places

    def host_of(self, replica: int, stage: int) -> str | None:  # noqa: ARG002 - there is one replica
        return self._places[stage].host

    def close(self) -> None:
        """They are ended by whoever started them."""


class _Head:
    """An engine's core with one replica of so many stages."""

    def __init__(self, plan: Plan, addresses: Sequence[str], stack: ExitStack) -> None:
        cluster = _Servers(addresses)
        host = RemoteHost(plan.artifact, plan.stages, cluster, max_length=plan.scheduling.max_length)
        stack.callback(host.close)
        self._host, self._plan = host, plan
        self._runner: RemoteRunner | None = None
        self._core = EngineCore(
            replicas=[Replica(0, self._make, plan.scheduling)],
            tokenizer=None,
            limits=plan.limits,
            close_model=host.close,
        )
        stack.callback(self._core.close)

    def _make(self) -> RemoteRunner:
        self._runner = self._host.runner(0, slots_per_group=self._plan.scheduling.slots_per_group)
        return self._runner

    def batches(self) -> int:
        """That the first stage has run, once it has told."""
        time.sleep(_REPORTED)
        assert self._runner is not None
        return stage_counts(self._runner.counts())[0].runs

    def run(self, sequences: int) -> None:
        """Requests of a short prompt until all have ended."""
        left, done = [sequences], threading.Event()

        def sink(outputs: Sequence[tuple[int, RequestOutput]]) -> None:
            left[0] -= sum(output.finished for _, output in outputs)
            if left[0] == 0:
                done.set()

        params = SamplingParams(temperature=0.0, max_tokens=_TOKENS, ignore_eos=True)
        for number in range(sequences):
            self._core.submit(str(number), [5 + number % 100] * 4, params, sink)
        if not done.wait(600):
            raise TimeoutError(f"{left[0]} of {sequences} requests have not ended in 600 s")


def measured(artifact: Artifact, stages: int, rows: Sequence[int]) -> tuple[dict[int, float], float]:
    """The seconds of a batch by its rows, and the share of a core of a stage that idles."""
    folder = str(artifact.folder.absolute())
    args = EngineArgs(folder, pipeline_parallel_size=stages, max_batch_size=stages * max(rows), max_model_len=512)
    with ExitStack() as stack:
        addresses = [stack.enter_context(server(os.sched_getaffinity(0)))[1] for _ in range(stages)]
        head = _Head(make_plan(args, artifact), addresses, stack)
        head.run(stages)
        found = {}
        for count in rows:
            rounds = [_round(head, count * stages) for _ in range(_ROUNDS)]
            found[count] = min(rounds)
        time.sleep(_REPORTED)
        before = time.process_time()
        time.sleep(_IDLE_SECONDS)
        return found, (time.process_time() - before) / _IDLE_SECONDS / stages


def _round(head: _Head, sequences: int) -> float:
    before = head.batches()
    started = time.process_time()
    head.run(sequences)
    spent = time.process_time() - started
    return spent / (head.batches() - before)


def fitted(batches: dict[tuple[int, int], float], idle: float) -> Model:
    """The least squares of relative errors, of no part below zero."""
    terms = np.array([[1.0, stages - 1, rows] for stages, rows in batches])
    seconds = np.array(list(batches.values()))
    found = np.linalg.lstsq(terms / seconds[:, None], np.ones(len(seconds)), rcond=None)[0]
    batch, stage, row = (max(float(one), 0.0) for one in found)
    return Model(batch=batch, stage=stage, row=row, idle=idle)


def bars() -> Iterator[Bar]:
    """The batches that were measured, the model of all, and what it says of more hosts."""
    artifact = open_artifact(built(SYNTHETIC_TINY, 4).folder, full=False)
    batches: dict[tuple[int, int], float] = {}
    idle: list[float] = []
    for stages in dict.fromkeys(stages for stages, _ in _SHAPES):
        found, idling = measured(artifact, stages, [rows for s, rows in _SHAPES if s == stages])
        batches |= {(stages, rows): seconds for rows, seconds in found.items()}
        idle.append(idling)
    model = fitted(batches, min(idle))
    for (stages, rows), seconds in batches.items():
        off = abs(model.seconds(stages, rows) / seconds - 1)
        beside = f"{seconds * 1e3:.3f} ms measured, {model.seconds(stages, rows) * 1e3:.3f} ms by the model"
        yield Bar(what=f"a batch of {rows} rows, {stages} stages: off", figure=off, limit=_OFF, beside=beside)
    for name in ("batch", "stage", "row"):
        yield Bar(what=f"the model: a {name}", figure=getattr(model, name) * 1e3, limit=None, unit=" ms")
    yield Bar(what="the model: a stage that idles, cores", figure=model.idle, limit=0.02)
    yield from on_paper(model)


def on_paper(model: Model) -> Iterator[Bar]:
    """Hosts of one stage each, at 16 rows and 20 ms a stage."""
    for hosts, stages in _HOSTS:
        cores = model.cores(hosts, stages)
        enough = "one head" if cores < 1 else f"{int(np.ceil(cores))} heads behind a router"
        limit = 1.0 if hosts == min(h for h, _ in _HOSTS) else None
        what = f"{hosts} hosts as {hosts // stages} replicas of {stages} stages: cores of the head"
        yield Bar(what=what, figure=cores, limit=limit, beside=enough)
    for stages in (1, 4):
        yield Bar(what=f"replicas of {stages} stages that fill a core", figure=model.most_replicas(stages), limit=None)


if __name__ == "__main__":
    sys.exit(0 if show(bars(), Console(width=140)) else 1)
