"""A runner for tests: it has no model, and its faults are chosen."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from furiosa_llm.runtime.artifact.dtypes import Array
from furiosa_llm.runtime.runners.batch import Batch, Prefill

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
        return _count_on(piece.tokens[index] for piece in batch.pieces for index in piece.wanted)


def _count_on(tokens: Iterable[int]) -> Array:
    following = [(token + 1) % VOCAB for token in tokens]
    return np.eye(VOCAB, dtype=np.float32)[following] * 10
