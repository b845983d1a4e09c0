"""Puts a load on an engine, and notes when each token came: open loop, by a schedule, or closed, so many at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from queue import Empty, SimpleQueue

from furiosa_llm.bench.workload import Job
from furiosa_llm.runtime.artifact.progress import tell
from furiosa_llm.runtime.engine.core import EngineCore, Handle
from furiosa_llm.runtime.requests.outputs import RequestOutput
from furiosa_llm.runtime.tokens.sampling_params import SamplingParams


@dataclass(slots=True, kw_only=True)
class Record:
    """What became of one request. Times are in seconds since the load began."""

    due: float
    """When it should have been sent, or if there was no schedule, when it was. What it waited because the sender was
    late, or too many were under way, counts as its latency."""
    num_prompt: int
    """Tokens of its prompt."""
    token_times: list[float] = field(default_factory=list)
    """When each token of its completion left the engine."""
    ended: float | None = None
    """When its last output left the engine; None while it runs."""
    error: str | None = None
    """Why it failed, None if it did not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """A load that is over. `duration` is from its begin to the end of its last request, in seconds."""

    records: tuple[Record, ...]
    duration: float
    max_concurrency: int


def run_load(
    core: EngineCore,
    jobs: Sequence[Job],
    params: SamplingParams,
    *,
    due: Sequence[float] | None,
    concurrency: int | None,
    clock: Callable[[], float] = time.perf_counter,
) -> Observed:
    """Sends `jobs`, each when it is `due` (None: at once) and fewer than `concurrency` (None: any) are under way.

    `params` hold for all, but for `max_tokens`. A request that fails is recorded, the others go on; what stops this
    itself, such as Ctrl-C, aborts all. A `clock` that stands still while nothing runs has nothing `due`.
    """
    load = _Load(core, params, clock)
    try:
        return load.run(jobs, due, len(jobs) if concurrency is None else concurrency)
    except BaseException:
        load.abort()
        raise


class _Load:
    def __init__(self, core: EngineCore, params: SamplingParams, clock: Callable[[], float]) -> None:
        self._core = core
        self._clock = clock
        self._params = params
        self._ended: SimpleQueue[int] = SimpleQueue()
        self._records: list[Record] = []
        self._handles: dict[int, Handle] = {}
        self._started = 0.0

    def run(self, jobs: Sequence[Job], due: Sequence[float] | None, concurrency: int) -> Observed:
        """See `run_load`."""
        self._started = self._clock()
        most = 0
        while len(self._records) < len(jobs) or self._handles:
            self._take_ended(self._patience(due, len(jobs), concurrency))
            while len(self._records) < len(jobs) and len(self._handles) < concurrency:
                wanted = self._now() if due is None else due[len(self._records)]
                if wanted > self._now():
                    break
                self._send(jobs[len(self._records)], wanted)
            most = max(most, len(self._handles))
            tell("running requests", len(self._records) - len(self._handles), len(jobs))
        ends = [record.ended for record in self._records if record.ended is not None]
        return Observed(records=tuple(self._records), duration=max(ends), max_concurrency=most)

    def abort(self) -> None:
        """Ends what is under way."""
        for handle in self._handles.values():
            handle.abort()

    def _now(self) -> float:
        return self._clock() - self._started

    def _patience(self, due: Sequence[float] | None, count: int, concurrency: int) -> float | None:
        """How long an end may be waited for, in seconds; None if nothing else can happen before."""
        sent = len(self._records)
        if sent == count or len(self._handles) >= concurrency:
            return None
        return 0.0 if due is None else max(0.0, due[sent] - self._now())

    def _take_ended(self, patience: float | None) -> None:
        with suppress(Empty):  # the next request is due before one has ended
            del self._handles[self._ended.get(timeout=patience)]
            while True:
                del self._handles[self._ended.get_nowait()]

    def _send(self, job: Job, due: float) -> None:
        index = len(self._records)
        record = Record(due=due, num_prompt=len(job.prompt_token_ids))
        self._records.append(record)

        def take(outputs: Sequence[tuple[int, RequestOutput]]) -> None:
            now = self._now()
            for _, output in outputs:
                record.token_times += [now] * sum(len(one.token_ids) for one in output.outputs)
                if output.finished:
                    record.ended = now
                    record.error = None if output.error is None else str(output.error)
                    self._ended.put(index)

        params = replace(self._params, max_tokens=job.max_tokens)
        self._handles[index] = self._core.submit(str(index), job.prompt_token_ids, params, take)
