"""A process that steps one lane of a replica.

The parent sends an `Assignment`, then batches; the worker answers each with what it gave. It ends with the connection,
so none outlives its parent.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import numpy.typing as npt

from furiosa_llm.runtime.adapters.adapter import Adapter
from furiosa_llm.runtime.artifact.compute import computing
from furiosa_llm.runtime.artifact.dtypes import Array
from furiosa_llm.runtime.artifact.errors import FuriosaLLMError
from furiosa_llm.runtime.artifact.files import Folder, Handles
from furiosa_llm.runtime.artifact.reader import open_artifact
from furiosa_llm.runtime.errors import WorkerError
from furiosa_llm.runtime.execution.binding import BoundProgram
from furiosa_llm.runtime.placement.stages import Stage
from furiosa_llm.runtime.runners.batch import Batch, Companions, with_adapters
from furiosa_llm.runtime.runners.loaded_model import LoadedModel, load_model
from furiosa_llm.runtime.runners.shared_memory import Arena, ProcessBarrier, ProcessLane
from furiosa_llm.runtime.runners.steps import GroupRunner


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """What a worker is to do: which lane of which artifact, and the descriptors it has inherited.

    `barriers` are by group, each `[sender][receiver]`.
    """

    folder: Path
    files: Handles
    stages: tuple[Stage, ...]
    lane: int
    lanes: int
    slots_per_group: int
    mapped: bool
    separate: bool
    compute: str | None
    companions: Companions
    max_step_nbytes: int | None
    arena: int
    barriers: tuple[tuple[tuple[int, ...], ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """The worker has loaded its lane. `ranks` are its ranks; `collectives[stage][section]` names a section's."""

    ranks: tuple[int, ...]
    collectives: tuple[tuple[tuple[str, ...], ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Forget:
    """Adapters of these keys are in no batch any more."""

    keys: frozenset[int]


ToWorker = tuple[int, Batch] | Adapter | Forget
"""What a worker is sent: a batch and its number, or before that an adapter, which batches then name by its key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InArena:
    """Logits in the arena."""

    offset: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What became of batch `number`: logits, from the worker of the first lane alone, or an error."""

    number: int
    logits: InArena | Array | None = None
    error: Exception | None = None


def main(descriptor: int) -> None:
    """Serves the parent at the other end of `descriptor` until it closes the connection."""
    connection: Connection[Any, Any] = Connection(descriptor)
    try:
        assignment: Assignment = connection.recv()
    except EOFError:
        return
    try:
        model = load_model(
            computing(
                open_artifact(assignment.folder, full=False, files=Folder(assignment.folder, assignment.files)),
                assignment.compute,
            ),
            assignment.stages,
            lanes=assignment.lanes,
            threads=1,
            mapped=assignment.mapped,
            separate=assignment.separate,
            own=(assignment.lane,),
            companions=assignment.companions,
            max_step_nbytes=assignment.max_step_nbytes,
        )
    except Exception as error:  # noqa: BLE001 - the parent raises it
        connection.send(_sendable(error))
        return
    _Worker(connection, assignment, model).serve()


class _Worker:
    def __init__(self, connection: Connection[Any, Any], assignment: Assignment, model: LoadedModel) -> None:
        groups, stages = len(assignment.barriers), len(model.programs)
        self._connection = connection
        self._lane = assignment.lane
        self._model = model
        self._arena = Arena(assignment.arena, groups)
        self._positions = self._arena.positions(groups, stages, assignment.lanes)
        self._counters = self._arena.counters(groups, stages, assignment.lanes)
        self._sending = threading.Lock()
        self._queues: list[SimpleQueue[tuple[int, Batch]]] = [SimpleQueue() for _ in range(groups)]
        self._groups = [self._group(group, assignment) for group in range(groups)]

    def serve(self) -> None:
        """Takes batches until the parent closes the connection; then the process ends, whatever is under way."""
        for group in range(len(self._groups)):
            threading.Thread(target=self._serve_group, args=(group,), daemon=True).start()
        programs = self._model.programs
        ready = Ready(
            ranks=programs[0].lanes.ranks[self._lane],
            collectives=tuple(
                tuple(tuple(e.call.collective.id for e in section.exchanges) for section in program.lanes.sections)
                for program in programs
            ),
        )
        self._connection.send(ready)
        adapters: dict[int, Adapter] = {}
        while True:
            try:
                message: ToWorker = self._connection.recv()
            except (EOFError, ConnectionResetError):
                os._exit(0)
            match message:
                case Adapter():
                    adapters[message.key] = message
                case Forget():
                    for key in message.keys:
                        del adapters[key]
                case _:
                    number, batch = message
                    known = with_adapters(batch, lambda one: adapters[one.key])
                    self._queues[known.group].put((number, known))

    def _group(self, group: int, assignment: Assignment) -> GroupRunner:
        barrier = ProcessBarrier(assignment.barriers[group], self._lane)
        return GroupRunner(
            self._model,
            slots=assignment.slots_per_group,
            crew=ProcessLane(barrier),
            counters=self._counters[group, :, self._lane],
            allocate=lambda _, nbytes: self._arena.allocate(group, nbytes),
        )

    def _serve_group(self, group: int) -> None:
        positions = self._positions[group]

        @contextmanager
        def occupy(stage: int, bound: BoundProgram) -> Iterator[None]:
            here: npt.NDArray[np.int64] = positions[stage]
            bound.section_of_lane = here
            yield
            here[self._lane] = -1

        while True:
            number, batch = self._queues[group].get()
            try:
                logits = self._groups[group].run(batch, occupy)
                answer = Answer(number=number, logits=self._shown(logits) if self._lane == 0 else None)
            except Exception as error:  # noqa: BLE001 - the parent raises it
                answer = Answer(number=number, error=_sendable(error))
            with self._sending:
                self._connection.send(answer)

    def _shown(self, logits: Array) -> InArena | Array:
        """Where the parent finds `logits`, or they themselves if they are not in the arena."""
        offset = self._arena.place_of(logits)
        if offset is None or logits.dtype.isbuiltin != 1:
            return logits
        return InArena(offset=offset, dtype=logits.dtype.str, shape=logits.shape)


def _sendable(error: Exception) -> Exception:
    """`error`, or its text in an error that can be sent."""
    if isinstance(error, FuriosaLLMError) and len(error.args) == 1:
        return error
    return WorkerError(f"{type(error).__name__}: {error}")
