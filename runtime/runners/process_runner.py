"""A replica whose lanes are processes: each PE is isolated from this process, and from the PEs of other lanes."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from multiprocessing import connection as connections
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from furiosa_llm.runtime.artifact.dtypes import Array
from furiosa_llm.runtime.artifact.files import Folder
from furiosa_llm.runtime.artifact.progress import tell
from furiosa_llm.runtime.artifact.reader import Artifact
from furiosa_llm.runtime.closing import Closing
from furiosa_llm.runtime.errors import InputError, WorkerError
from furiosa_llm.runtime.execution.counters import Counters, merged
from furiosa_llm.runtime.execution.sessions import ranks_text
from furiosa_llm.runtime.placement.stages import Stage
from furiosa_llm.runtime.runners.batch import NO_COMPANIONS, Batch, Companions, with_adapters
from furiosa_llm.runtime.runners.far_runner import FarRunner
from furiosa_llm.runtime.runners.shared_memory import Arena, ProcessBarrier
from furiosa_llm.runtime.runners.worker import Answer, Assignment, Forget, InArena, Ready, ToWorker


class ProcessHost(Closing):
    """Makes replicas of an artifact whose lanes are `workers` processes each; stands where a `Host` stands for threads.

    Nothing is shared between replicas but the pages of weights that are `mapped`.
    """

    def __init__(
        self,
        artifact: Artifact,
        stages: Sequence[Stage],
        *,
        workers: int,
        mapped: bool = False,
        separate: bool = False,
        companions: Companions = NO_COMPANIONS,
        max_step_nbytes: int | None = None,
    ) -> None:
        size = artifact.manifest.mesh.size
        if not 1 <= workers <= size:
            raise InputError(f"workers must be between 1 and the {size} PEs of a stage, got {workers}")
        self._artifact = artifact
        self._stages = tuple(stages)
        self._workers = workers
        self._mapped = mapped
        self._separate = separate
        self._companions = companions
        self._max_step_nbytes = max_step_nbytes

    def runner(self, *, slots_per_group: int) -> ProcessRunner:
        """A replica in processes of its own; raises what a worker raises that cannot load its lane."""
        return ProcessRunner(
            self._artifact.files,
            self._stages,
            workers=self._workers,
            slots_per_group=slots_per_group,
            mapped=self._mapped,
            separate=self._separate,
            compute=self._artifact.compute,
            companions=self._companions,
            max_step_nbytes=self._max_step_nbytes,
        )

    def close(self) -> None:
        """Nothing is left to end: runners end their own processes."""


@dataclass(slots=True)
class _UnderWay:
    """A batch under way: who has not answered yet, and what was answered."""

    future: Future[Array]
    missing: set[int]
    logits: Array | None = field(default=None)

    def fail(self, error: Exception) -> None:
        """Whoever waits for it gets `error`."""
        self.future.set_exception(error)


class ProcessRunner(FarRunner[_UnderWay]):
    """One replica in `workers` processes; see `Runner`.

    A process that ends, or a batch that fails in one, fails all that is under way and ends the other processes.
    """

    def __init__(
        self,
        files: Folder,
        stages: Sequence[Stage],
        *,
        workers: int,
        slots_per_group: int,
        mapped: bool = False,
        separate: bool = False,
        compute: str | None = None,
        companions: Companions = NO_COMPANIONS,
        max_step_nbytes: int | None = None,
    ) -> None:
        super().__init__()
        self._groups = len(stages)
        self._numbers = itertools.count()
        arena = Arena.create(self._groups)
        barriers = [ProcessBarrier.create(workers) for _ in range(self._groups)]
        try:
            self._arena = Arena(arena, self._groups)
            self._positions = self._arena.positions(self._groups, len(stages), workers)
            self._positions[...] = -1
            self._counters = self._arena.counters(self._groups, len(stages), workers)
            self._processes: list[subprocess.Popen[bytes]] = []
            self._connections: list[Connection[Any, Any]] = []
            for lane in range(workers):
                assignment = Assignment(
                    folder=files.path,
                    files=files.handles,
                    stages=tuple(stages),
                    lane=lane,
                    lanes=workers,
                    slots_per_group=slots_per_group,
                    mapped=mapped,
                    separate=separate,
                    compute=compute,
                    companions=companions,
                    max_step_nbytes=max_step_nbytes,
                    arena=arena,
                    barriers=tuple(tuple(tuple(row) for row in rows) for rows in barriers),
                )
                self._start(assignment)
        finally:
            os.close(arena)
            for descriptor in (d for rows in barriers for row in rows for d in row if d >= 0):
                os.close(descriptor)
        tell(f"loading the weights in {workers} processes")
        self._ready = self._await_ready()
        self._reader = threading.Thread(target=self._read, name="furiosa-workers", daemon=True)
        self._reader.start()

    @property
    def num_groups(self) -> int:
        """How many batches may be under way at once."""
        return self._groups

    @property
    def process_ids(self) -> tuple[int, ...]:
        """The workers' process ids, by lane."""
        return tuple(process.pid for process in self._processes)

    def submit(self, batch: Batch) -> Future[Array]:
        """Sends `batch` to all workers and returns at once."""
        future: Future[Array] = Future()
        number = next(self._numbers)
        with self._lock:
            if self._error is not None:
                future.set_exception(self._error)
                return future
            self._under_way[number] = _UnderWay(future, set(range(len(self._connections))))
        messages: list[ToWorker] = self._news(batch)
        messages.append((number, with_adapters(batch, lambda one: replace(one, arrays={}))))
        for lane, connection in enumerate(self._connections):
            try:
                for message in messages:
                    connection.send(message)
            except OSError:
                self._fail(self._ended(lane))
                break
        return future

    def _news(self, batch: Batch) -> list[ToWorker]:
        """What workers are told before `batch`: the adapters in it that they do not have, and those that are gone."""
        gone, new = self._changed_adapters(batch)
        return [*([Forget(keys=frozenset(gone))] if gone else []), *new]

    def progress(self) -> str:
        """In which segment each worker is, and the last collective that all of them have done."""
        lines = []
        for group, stage in np.argwhere((self._positions >= 0).any(axis=2)):
            here, collectives = self._positions[group, stage], self._ready[0].collectives[stage]
            # no worker is past the first segment before all have begun: whoever is in none then is through
            begun = int(here.max()) > 0
            behind = int(np.where(here >= 0, here, len(collectives) if begun else 0).min())
            done = [name for step in collectives[:behind] for name in step]
            elsewhere = "through" if begun else "in none"
            where = ", ".join(
                f"{ranks_text(ready.ranks)} {f'in segment {step}' if step >= 0 else elsewhere}"
                for ready, step in zip(self._ready, here.tolist(), strict=True)
            )
            lines.append(f"stage {stage}: {where}; last collective done: {done[-1] if done else 'none'}")
        return "; ".join(lines) or "nothing is under way"

    def counts(self) -> Counters:
        """See `ReportsCounts`."""
        return merged(self._counters)

    def close(self) -> None:
        """Ends the processes; what is under way fails."""
        super().close()
        self._reader.join(timeout=5)

    # -- the processes -----------------------------------------------------------------------------------------

    def _start(self, assignment: Assignment) -> None:
        ours, theirs = socket.socketpair()
        inherited = [theirs.fileno(), assignment.arena, *assignment.files.descriptors]
        inherited += [d for rows in assignment.barriers for row in rows for d in row if d >= 0]
        # Not by -m, under which the worker's classes would belong to another module than ours.
        program = f"from furiosa_llm.runtime.runners.worker import main; main({theirs.fileno()})"
        command = [sys.executable, "-P", "-c", program]
        with theirs:
            process = subprocess.Popen(command, pass_fds=inherited, start_new_session=True, stdin=subprocess.DEVNULL)
        self._processes.append(process)
        self._connections.append(Connection(ours.detach()))
        self._connections[-1].send(assignment)

    def _await_ready(self) -> tuple[Ready, ...]:
        found: list[Ready] = []
        for lane, connection in enumerate(self._connections):
            try:
                answer = connection.recv()
            except (EOFError, OSError):
                answer = self._ended(lane)
            if not isinstance(answer, Ready):
                self._end_all()
                raise answer
            found.append(answer)
        return tuple(found)

    def _read(self) -> None:
        lanes = {connection: lane for lane, connection in enumerate(self._connections)}
        while self._error is None:
            for ready in connections.wait(list(lanes), timeout=1):
                lane = lanes[ready]  # type: ignore[index]
                try:
                    answer = self._connections[lane].recv()
                except (EOFError, OSError):
                    self._fail(self._ended(lane))
                    break
                self._take(lane, answer)
        self._end_all()

    def _take(self, lane: int, answer: Answer) -> None:
        if answer.error is not None:
            self._fail(answer.error)
            return
        with self._lock:
            entry = self._under_way.get(answer.number)
            if entry is None:
                return
            entry.missing.discard(lane)
            if answer.logits is not None:
                entry.logits = self._found(answer.logits)
            if entry.missing or entry.logits is None:
                return
            del self._under_way[answer.number]
        entry.future.set_result(entry.logits)

    def _found(self, logits: InArena | Array) -> Array:
        if isinstance(logits, InArena):
            return self._arena.array(logits.offset, np.dtype(logits.dtype), logits.shape)
        return logits

    def _ended(self, lane: int) -> WorkerError:
        """Says of the process of `lane`, whose connection is closed, how it ended."""
        process = self._processes[lane]
        try:
            code = process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        return WorkerError(f"worker {lane}, process {process.pid}, has ended {how}; its replica's requests are lost")

    def _stop(self) -> None:
        for process in self._processes:
            process.kill()

    def _end_all(self) -> None:
        self._stop()
        for process, connection in zip(self._processes, self._connections, strict=True):
            process.wait()
            connection.close()
