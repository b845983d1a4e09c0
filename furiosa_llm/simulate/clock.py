"""The product's scheduler and router on simulated time: which batch runs is theirs, how long it takes is `steps.py`'s.

Nothing is drawn at random and no real clock is read: the same requests give the same times.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from furiosa_llm.bench.load import Observed, Record
from furiosa_llm.runtime.artifact.progress import tell
from furiosa_llm.runtime.engine.router import choose_replica
from furiosa_llm.runtime.engine.scheduler import PAGE_SIZE, Scheduler, SchedulerLimits
from furiosa_llm.runtime.runners.batch import Batch, Decode, Piece, Prefill, Row
from furiosa_llm.simulate.closed_form import check_room
from furiosa_llm.simulate.requests import Request
from furiosa_llm.simulate.steps import Steps

_TOLD_EVERY = 1000
"""Batches between two reports of progress."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A batch in a stage."""

    replica: int
    stage: int
    begin: float
    end: float
    kind: str
    """`prefill` or `decode`."""
    tokens: int
    sequences: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What happened."""

    observed: Observed
    """As a benchmark of the engine would have observed it."""
    spans: tuple[Span, ...]
    """Every batch in every stage; none unless asked for."""
    preemptions: int


def limits_of(steps: Steps) -> SchedulerLimits:
    """What a replica has room for. Raises PlacementError if that is not even a page of cache."""
    stages, software = len(steps.counts), steps.software
    check_room(steps, PAGE_SIZE)
    tokens = steps.cache_tokens()
    return SchedulerLimits(
        num_groups=stages,
        slots_per_group=max(1, round(software.max_sequences.value) // stages),
        num_pages=tokens // PAGE_SIZE,
        page_size=PAGE_SIZE,
        max_length=tokens,
        prefill_chunk_size=round(software.chunk.value),
        prefix_caching=True,
    )


def run(
    steps: Steps,
    requests: Sequence[Request],
    *,
    concurrency: int | None = None,
    shared_prefix: int = 0,
    spans: bool = False,
) -> Run:
    """Serve `requests`: each when it arrives, or in a closed loop of `concurrency` users.

    All prompts begin with the same `shared_prefix` tokens, and share nothing else. Raises CapacityError for a request
    that is longer than the cache.
    """
    return _Clock(steps, requests, concurrency, shared_prefix, spans).run()


@dataclass(slots=True)
class _Replica:
    """As the router sees it, with the times from which its stages are free."""

    number: int
    scheduler: Scheduler
    free: list[float]
    load: int = 0
    decoding: dict[int, tuple[int, float]] = field(default_factory=dict)
    """Group -> the rows of its last decode, and their mean length."""
    death: BaseException | None = None
    ready: bool = True

    def cached_prefix(self, tokens: Sequence[int], adapter: int) -> int:
        """Of the prompt, what it has already."""
        return self.scheduler.cached_prefix(tokens, adapter)


class _Clock:
    def __init__(
        self, steps: Steps, requests: Sequence[Request], concurrency: int | None, shared_prefix: int, spans: bool
    ) -> None:
        limits = limits_of(steps)
        stages = len(steps.counts)
        self._steps, self._requests, self._shared = steps, requests, shared_prefix
        self._replicas = [
            _Replica(number, Scheduler(limits), [0.0] * stages) for number in range(steps.placement.data_parallel_size)
        ]
        self._place: dict[int, _Replica] = {}
        self._records = [Record(due=one.arrival, num_prompt=one.input_len) for one in requests]
        self._events: list[tuple[float, int, _Replica | None, Batch | int]] = []
        """Time, a number that orders what is at the same time, and a batch that has run or a request that arrives."""
        self._numbers = itertools.count()
        self._spans: list[Span] | None = [] if spans else None
        self._open = concurrency is None
        first = len(requests) if concurrency is None else min(concurrency, len(requests))
        for index in range(first):
            self._arrive(index, requests[index].arrival if self._open else 0.0)
        self._next = first

    def run(self) -> Run:
        """Event after event, until none is left."""
        most, now = 0, 0.0
        for done in itertools.count():
            if not self._events:
                break
            now, _, replica, what = heapq.heappop(self._events)
            if replica is None:
                assert isinstance(what, int)
                replica = self._take(what)
            else:
                assert not isinstance(what, int)
                self._complete(replica, what, now)
            most = max(most, len(self._place))
            self._start(replica, now)
            if done % _TOLD_EVERY == 0:
                ended = sum(record.ended is not None for record in self._records[: self._next])
                tell("simulating requests", ended, len(self._records))
        return Run(
            observed=Observed(records=tuple(self._records), duration=now, max_concurrency=most),
            spans=tuple(self._spans or ()),
            preemptions=sum(replica.scheduler.num_preemptions for replica in self._replicas),
        )

    def _arrive(self, index: int, at: float) -> None:
        """It reaches the scheduler once the server has dealt with it."""
        self._records[index].due = at
        later = at + self._steps.software.request_time.value
        heapq.heappush(self._events, (later, next(self._numbers), None, index))

    def _take(self, index: int) -> _Replica:
        one = self._requests[index]
        common = min(self._shared, one.input_len)
        prompt = [*range(common), *([-1 - index] * (one.input_len - common))]
        replica = self._replicas[choose_replica(self._replicas, prompt)]
        replica.scheduler.add(index, prompt)
        replica.load += one.input_len + one.output_len
        self._place[index] = replica
        return replica

    def _start(self, replica: _Replica, now: float) -> None:
        """All that the scheduler gives, each through its stages as these become free."""
        while (batch := replica.scheduler.schedule()) is not None:
            ways = self._steps.ways[replica.number]
            tokens = len(batch.rows) if isinstance(batch, Decode) else batch.num_tokens
            at = now + ways.into()
            for stage, begin in enumerate(replica.free):
                at = max(at, begin)
                end = at + self._seconds(replica, batch, stage)
                replica.free[stage] = end
                self._note(replica, batch, stage, at, end)
                at = end + ways.after(stage, tokens)
            heapq.heappush(self._events, (at, next(self._numbers), replica, batch))

    def _complete(self, replica: _Replica, batch: Batch, now: float) -> None:
        sampled = replica.scheduler.sequences_to_sample(batch)
        finished = []
        for index in sampled:
            times = self._records[index].token_times
            times.append(now)
            if len(times) == self._requests[index].output_len:
                finished.append(index)
        replica.scheduler.complete(batch, dict.fromkeys(sampled, 0), finished)
        for index in finished:
            one = self._requests[index]
            self._records[index].ended = now
            replica.load -= one.input_len + one.output_len
            del self._place[index]
            if not self._open and self._next < len(self._requests):
                self._arrive(self._next, now)
                self._next += 1

    def _seconds(self, replica: _Replica, batch: Batch, stage: int) -> float:
        steps = self._steps
        if isinstance(batch, Decode):
            rows = len(batch.rows)
            length = sum(row.start for row in batch.rows) / rows + 1
            replica.decoding[batch.group] = rows, length
            return steps.seconds(steps.decode(rows, length), stage)
        works = [steps.prefill(len(one.tokens), one.start, last=one.logits != "none") for one in batch.pieces]
        alone = sum(works[1:], start=works[0])
        rows, length = replica.decoding.get(batch.group, (0, 0.0))
        if not steps.software.mixed.value or not rows:
            return steps.seconds(alone, stage)
        decode = steps.decode(rows, length)  # the prompt is computed in a step that decodes
        return steps.seconds(alone + decode, stage) - steps.seconds(decode, stage)

    def _note(self, replica: _Replica, batch: Batch, stage: int, begin: float, end: float) -> None:
        if self._spans is None:
            return
        parts: Sequence[Piece | Row] = batch.pieces if isinstance(batch, Prefill) else batch.rows
        self._spans.append(
            Span(
                replica=replica.number,
                stage=stage,
                begin=begin,
                end=end,
                kind="prefill" if isinstance(batch, Prefill) else "decode",
                tokens=batch.num_tokens if isinstance(batch, Prefill) else len(batch.rows),
                sequences=tuple(one.sequence_id for one in parts),
            )
        )
