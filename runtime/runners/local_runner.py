"""Replicas in this process: what they share, and one of them, which runs batches on its stages.

A `Host` has the stages' graphs and sessions, hence the weights, and the cores. A `LocalRunner` is one replica: its KV
slots and the memory of its steps.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from queue import SimpleQueue

from furiosa_llm.runtime.artifact.dtypes import Array
from furiosa_llm.runtime.artifact.errors import FuriosaLLMError
from furiosa_llm.runtime.artifact.reader import Artifact
from furiosa_llm.runtime.closing import Closing
from furiosa_llm.runtime.errors import ExecutionError
from furiosa_llm.runtime.execution.binding import BoundProgram
from furiosa_llm.runtime.execution.counters import Counters, merged, new_counters, stage_counts
from furiosa_llm.runtime.execution.driver import Crew, cores_for
from furiosa_llm.runtime.placement.stages import Stage
from furiosa_llm.runtime.runners.batch import NO_COMPANIONS, Batch, Companions
from furiosa_llm.runtime.runners.loaded_model import load_model
from furiosa_llm.runtime.runners.steps import GroupRunner

_CLOSE_TIMEOUT = 5.0


class Host(Closing):
    """An artifact's stages loaded into this process, for any number of replicas.

    `threads` cores step the lanes (None: all that this process may use). `mapped` leaves the weights in their files,
    `separate` the nodes of every rank apart (see `load_model`), and `exact` is for comparisons (see `SessionSettings`).
    The rows that `companions` names are computed together with a copy of themselves. `max_step_nbytes` is as for
    `load_model`. With `spin_us` one step at a time has all cores, which poll for so long before they sleep.
    Close it, or use it as a context manager, to end its threads.
    """

    def __init__(
        self,
        artifact: Artifact,
        stages: Sequence[Stage],
        *,
        threads: int | None = None,
        mapped: bool = False,
        separate: bool = False,
        exact: bool = False,
        companions: Companions = NO_COMPANIONS,
        max_step_nbytes: int | None = None,
        spin_us: int = 0,
    ) -> None:
        self.threads = cores_for(threads)
        self.model = load_model(
            artifact,
            stages,
            lanes=self.threads,
            threads=self.threads,
            mapped=mapped,
            separate=separate,
            exact=exact,
            companions=companions,
            max_step_nbytes=max_step_nbytes,
            spin_us=spin_us,
        )
        self.crew = Crew(1 if spin_us else self.threads)

    def runner(self, *, slots_per_group: int) -> LocalRunner:
        """A replica with KV of its own: as many groups as stages, each of `slots_per_group` slots."""
        return LocalRunner(self, slots_per_group)

    def close(self) -> None:
        """Ends the threads; runners cannot run any more."""
        self.crew.close()


class LocalRunner:
    """One replica in this process; see `Runner`. Every group has a thread of its own, and every stage a lock."""

    def __init__(self, host: Host, slots_per_group: int) -> None:
        self._crew = host.crew
        stages = len(host.model.programs)
        self._counters = new_counters(stages, stages, 1)
        self._groups = [
            GroupRunner(host.model, slots=slots_per_group, crew=host.crew, counters=counters[:, 0])
            for counters in self._counters
        ]
        self._locks = [threading.Lock() for _ in range(stages)]
        self._doing: list[BoundProgram | None] = [None] * stages
        self._closing = threading.Lock()
        self._closed = False
        self._queues: list[SimpleQueue[tuple[Batch, Future[Array]] | None]] = [SimpleQueue() for _ in range(stages)]
        self._threads = [
            threading.Thread(target=self._serve, args=(group,), name=f"furiosa-group-{group}", daemon=True)
            for group in range(stages)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def num_groups(self) -> int:
        """How many batches may be under way at once."""
        return len(self._groups)

    @property
    def busy_seconds(self) -> list[float]:
        """How long each stage has been running."""
        return [stage.busy_seconds for stage in stage_counts(self.counts())]

    def counts(self) -> Counters:
        """See `ReportsCounts`."""
        return merged(self._counters)

    def submit(self, batch: Batch) -> Future[Array]:
        """Starts `batch` and returns at once; raises ExecutionError if the runner is closed."""
        future: Future[Array] = Future()
        with self._closing:
            if self._closed:
                raise ExecutionError("the runner is closed; make another one")
            self._queues[batch.group].put((batch, future))
        return future

    def progress(self) -> str:
        """What is being done now, for whoever wonders why nothing comes: stage, ranks, segment, collectives."""
        doing = [f"stage {stage}: {bound.progress()}" for stage, bound in enumerate(self._doing) if bound is not None]
        return "; ".join(doing) or "nothing is under way"

    def close(self) -> None:
        """Ends the threads, and what runs, at its next node. A thread that does not leave its node is left behind."""
        with self._closing:
            if not self._closed:
                self._closed = True
                for queue, group in zip(self._queues, self._groups, strict=True):
                    group.interruption.interrupt(ExecutionError("the runner was closed before the batch was done"))
                    queue.put(None)
        deadline = time.monotonic() + _CLOSE_TIMEOUT
        for thread in self._threads:
            thread.join(timeout=max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                self._crew.give_up(thread)

    def _serve(self, group: int) -> None:
        while (entry := self._queues[group].get()) is not None:
            batch, future = entry
            if not future.set_running_or_notify_cancel():
                continue
            try:
                with self._crew.expect():
                    logits = self._groups[group].run(batch, self._occupy)
            except FuriosaLLMError as error:
                future.set_exception(error)
            except BaseException as error:  # noqa: BLE001 - whoever waits for the batch gets it, and the thread goes on
                future.set_exception(_failed(batch, error))
            else:
                future.set_result(logits)

    @contextmanager
    def _occupy(self, stage: int, bound: BoundProgram) -> Iterator[None]:
        with self._locks[stage]:
            self._doing[stage] = bound
            try:
                yield
            finally:
                self._doing[stage] = None


def _failed(batch: Batch, error: BaseException) -> ExecutionError:
    failure = ExecutionError(f"a batch of group {batch.group} failed: {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure
