"""Runners for tests: one without a model, whose faults are chosen, and one over `DecoderSession`, a session a slot."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from furiosa_llm.runtime.batch import Batch, Prefill
from furiosa_llm.runtime.decoder import DecoderSession
from furiosa_llm.runtime.executor import Executor
from furiosa_llm.runtime.ort import Array

VOCAB = 32

Fault = Callable[[Batch, "CountingRunner"], None]


class CountingRunner:
    """Behind token t comes t + 1, modulo the vocabulary. `fault` is called with each batch before it runs."""

    def __init__(self, *, num_groups: int = 1, fault: Fault | None = None) -> None:
        self.num_groups = num_groups
        self.batches: list[Batch] = []
        self.closed = threading.Event()
        self._fault = fault
        self._pool = ThreadPoolExecutor(num_groups)

    def submit(self, batch: Batch) -> Future[Array]:
        self.batches.append(batch)
        return self._pool.submit(self._run, batch)

    def close(self) -> None:
        self.closed.set()
        self._pool.shutdown(wait=False)

    def progress(self) -> str:
        return f"batch {len(self.batches)}"

    def _run(self, batch: Batch) -> Array:
        if self._fault is not None:
            self._fault(batch, self)
        if not isinstance(batch, Prefill):
            return _count_on(row.token for row in batch.rows)
        return _count_on({"none": (), "last": batch.tokens[-1:], "all": batch.tokens}[batch.logits])


def _count_on(tokens: Iterable[int]) -> Array:
    following = [(token + 1) % VOCAB for token in tokens]
    return np.eye(VOCAB, dtype=np.float32)[following] * 10


class SessionRunner:
    """Runs every slot in a `DecoderSession` of its own, one row after the other; copied slots are stepped again."""

    def __init__(self, executor: Executor, *, slots: int, num_groups: int = 1) -> None:
        self.num_groups = num_groups
        self._sessions = [[DecoderSession(executor) for _ in range(slots)] for _ in range(num_groups)]
        self._held: list[list[list[int]]] = [[[] for _ in range(slots)] for _ in range(num_groups)]
        self._pool = ThreadPoolExecutor(num_groups)

    def submit(self, batch: Batch) -> Future[Array]:
        return self._pool.submit(self._run, batch)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _run(self, batch: Batch) -> Array:
        for copy in batch.copies:
            self._rewind(batch.group, copy.target, self._held[batch.group][copy.source][: copy.length])
        if not isinstance(batch, Prefill):
            rows = [self._step(batch.group, slot, row.start, (row.token,)) for slot, row in enumerate(batch.rows)]
            return np.concatenate([logits[-1:] for logits in rows])
        logits = self._step(batch.group, batch.slot, batch.start, batch.tokens)
        return {"none": logits[:0], "last": logits[-1:], "all": logits}[batch.logits]

    def _step(self, group: int, slot: int, start: int, tokens: tuple[int, ...]) -> Array:
        """The logits behind each of `tokens`."""
        if len(self._held[group][slot]) != start:
            self._rewind(group, slot, self._held[group][slot][:start])
        session = self._sessions[group][slot]
        self._held[group][slot] += tokens
        return np.concatenate([session.step(np.array([[token]]))[:1].copy() for token in tokens])

    def _rewind(self, group: int, slot: int, tokens: list[int]) -> None:
        self._sessions[group][slot].reset()
        self._held[group][slot] = []
        if tokens:
            self._step(group, slot, 0, tuple(tokens))
