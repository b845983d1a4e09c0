"""What a replica has done so far, counted by its thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from furiosa_llm.runtime.execution.counters import Counters, StageCounts, stage_counts
from furiosa_llm.runtime.runners.batch import Batch, Prefill, ReportsCounts


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaCounts:
    """What a replica has done."""

    prefilled_tokens: int = 0
    """Tokens of prompts and of preempted sequences that were computed: not what the prefix cache gave."""
    decoded_tokens: int = 0
    """Tokens that were stepped, one by one."""
    copies: int = 0
    """Copies of KV from slot to slot."""
    restarts: int = 0
    """How often its runner was replaced by another."""
    stages: tuple[StageCounts, ...] = ()
    """What its stages have done, on all runners that it has had."""


class ReplicaMeter:
    """Counts what a replica does, over all the runners that it has one after another; read from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._past: Counters | int = 0
        self._present: Callable[[], Counters] | None = None
        self._runners = 0
        self._prefilled = 0
        self._decoded = 0
        self._copies = 0

    def follow(self, runner: object) -> None:
        """Counts from now on what `runner` does, if it says so."""
        with self._lock:
            self._runners += 1
            if isinstance(runner, ReportsCounts):
                self._present = runner.counts

    def settle(self) -> None:
        """Keeps what the runner has counted, which is given up now."""
        with self._lock:
            self._past, self._present = self._total(), None

    def note(self, batch: Batch) -> None:
        """Counts a batch that is done."""
        self._copies += len(batch.copies)
        if isinstance(batch, Prefill):
            self._prefilled += batch.num_tokens
        else:
            self._decoded += len(batch.rows)

    def read(self) -> ReplicaCounts:
        """Everything so far."""
        with self._lock:
            total, runners = self._total(), self._runners
        return ReplicaCounts(
            prefilled_tokens=self._prefilled,
            decoded_tokens=self._decoded,
            copies=self._copies,
            restarts=runners - 1,
            stages=() if isinstance(total, int) else stage_counts(total),
        )

    def _total(self) -> Counters | int:
        if self._present is None:
            return self._past
        total: Counters = self._past + self._present()
        return total
