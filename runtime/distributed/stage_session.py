"""One stage of one replica: batches as its head sends them, what earlier stages give, and what it gives later ones."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from furiosa_llm.runtime.adapters.adapter import Adapter
from furiosa_llm.runtime.artifact.dtypes import DTYPES, Array
from furiosa_llm.runtime.distributed.wire import Message, parse_batch, parse_tensors
from furiosa_llm.runtime.errors import WireError
from furiosa_llm.runtime.execution.binding import private_block
from furiosa_llm.runtime.execution.counters import Counters, count_run, count_send, new_counters, rows_of
from furiosa_llm.runtime.execution.driver import Crew
from furiosa_llm.runtime.execution.ort import Tensor, wrap
from furiosa_llm.runtime.program.interruption import Interruption
from furiosa_llm.runtime.program.lanes import Lanes
from furiosa_llm.runtime.runners.batch import Batch, Prefill
from furiosa_llm.runtime.runners.loaded_model import LoadedModel
from furiosa_llm.runtime.runners.steps import Results, StageBuffers, Step, Use, adapters_of_step, logits_of, steps_of

Crossing = tuple[tuple[str, int], ...]
"""Values that cross from one stage to another, each with a rank that has it: one for all ranks on which it is alike."""


def crossing(lanes: Lanes, names: Sequence[str]) -> Crossing:
    """What crosses of the values `names`."""
    ranks = range(lanes.mesh.size)
    return tuple((name, rank) for name in names for rank in sorted({_owner(lanes, name, rank) for rank in ranks}))


def _owner(lanes: Lanes, name: str, rank: int) -> int:
    return lanes.alike.get((rank, name), rank)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """What a step gives: tensors for later stages, and the batch's logits if it was its last step on the last stage."""

    step: int
    tensors: Mapping[int, Sequence[Array]]
    logits: Array | None = None
    picks: tuple[bool, ...] = ()


@dataclass(slots=True, kw_only=True)
class _Pending:
    """A batch whose steps have not all run; what earlier stages sent may be here before the batch itself is."""

    batch: Batch | None = None
    picks: tuple[bool, ...] = ()
    results: Results | None = None
    next: int = 0
    tensors: dict[tuple[int, int], list[Array]] = field(default_factory=dict)


class StageSession:
    """Runs stage `stage` of `model`, which is loaded, for one replica with as many groups as there are stages."""

    def __init__(self, model: LoadedModel, stage: int, crew: Crew, *, slots_per_group: int, max_length: int) -> None:
        (self._program,) = model.programs
        self._model = model
        self._stage = stage
        self._slots = slots_per_group
        self._max_length = max_length
        groups = len(model.graphs)
        self.counters: Counters = new_counters(1)
        self._row = rows_of(self.counters)[0]
        self._buffers = [
            StageBuffers(
                model,
                self._program,
                slots=slots_per_group,
                crew=crew,
                allocate=private_block,
                interruption=Interruption(),
            )
            for _ in range(groups)
        ]
        self._inboxes: list[dict[tuple[str, int], Tensor]] = [{} for _ in range(groups)]
        self._pending: dict[int, _Pending] = {}
        lanes = self._program.lanes
        received = self._program.graph.received
        self._from = {
            other: crossing(lanes, [name for name, made_by in received.items() if made_by == other])
            for other in sorted(set(received.values()))
        }
        later = model.graphs[stage + 1 :]
        names = {graph.index: [name for name, made_by in graph.received.items() if made_by == stage] for graph in later}
        self._to = {other: crossing(lanes, given) for other, given in names.items() if given}

    @property
    def later(self) -> list[int]:
        """The stages that get something of this one."""
        return list(self._to)

    def knows(self, number: int) -> bool:
        """Whether batch `number`, or something for it, is here and has not all run."""
        return number in self._pending

    def take_batch(self, message: Message, adapters: Mapping[int, Adapter]) -> None:
        """Takes a message RUN."""
        batch, picks = parse_batch(message.frame(), adapters)
        self._check(batch)
        pending = self._entry(message.number)
        if pending.batch is not None:
            raise WireError(f"batch {message.number} comes a second time")
        pending.batch, pending.picks = batch, picks
        pending.results = Results(steps_of(batch, self._model.traits, self._model.companions))
        self._buffers[batch.group].copy(batch)

    def take_tensors(self, message: Message) -> None:
        """Takes a message TENSORS; `second` is the stage that it comes from."""
        if message.second not in self._from:
            raise WireError(f"tensors of stage {message.second}, of which stage {self._stage} gets none")
        types = self._program.lanes.types
        kinds = [types[self._program.lanes.name(rank, name)] for name, rank in self._from[message.second]]
        arrays = parse_tensors(message.frames, [DTYPES[kind.dtype].numpy for kind in kinds])
        for (name, _), kind, array in zip(self._from[message.second], kinds, arrays, strict=True):
            dims = kind.shape if kind.shape is not None else array.shape
            pairs = zip(dims, array.shape, strict=False)
            if len(dims) != array.ndim or any(isinstance(known, int) and known != size for known, size in pairs):
                raise WireError(f"{name!r:.80} has the shape {array.shape}, expected {dims}")
        self._entry(message.number).tensors[message.first, message.second] = arrays

    def run(self, number: int) -> Sent | None:
        """Runs the next step of batch `number`, if all that it needs is here."""
        pending = self._pending[number]
        if pending.batch is None or any((pending.next, other) not in pending.tensors for other in self._from):
            return None
        assert pending.results is not None
        index, step = pending.next, pending.results.steps[pending.next]
        group = pending.batch.group
        started = time.perf_counter_ns()
        for other, values in self._from.items():
            self._put(group, values, pending.tensors.pop((index, other)))
        use = self._run(group, step, started)
        tensors = {other: [use.bound.array(rank, name) for name, rank in values] for other, values in self._to.items()}
        pending.next += 1
        done = pending.next == len(pending.results.steps)
        if done:
            del self._pending[number]
        if self._stage < len(self._model.graphs) - 1:
            return Sent(step=index, tensors=tensors)
        pending.results.add(step, logits_of(self._model, step, use))
        return Sent(step=index, tensors=tensors, logits=pending.results.logits if done else None, picks=pending.picks)

    def _run(self, group: int, step: Step, started: int) -> Use:
        buffers, lanes, inbox = self._buffers[group], self._program.lanes, self._inboxes[group]

        def received(_: int, name: str, rank: int) -> Tensor:
            return inbox[name, _owner(lanes, name, rank)]

        use = buffers.use(step, adapters_of_step(self._model, step), received)
        begun = time.perf_counter_ns()
        use.bound.run()
        count_run(self._row, begun)
        use.bound.count(self._row)
        if self._from:
            count_send(self._row, use.received_nbytes(received), begun - started)
        buffers.finish(step, use)
        return use

    def _put(self, group: int, values: Crossing, arrays: Sequence[Array]) -> None:
        """Puts what has arrived where the group's steps read it."""
        inbox, lanes = self._inboxes[group], self._program.lanes
        for place, array in zip(values, arrays, strict=True):
            name, rank = place
            known = inbox.get(place)
            if known is None or known.array.shape != array.shape:
                known = inbox[place] = wrap(np.empty_like(array), lanes.types[lanes.name(rank, name)].dtype)
            np.copyto(known.array, array)

    def _entry(self, number: int) -> _Pending:
        if number not in self._pending:
            if len(self._pending) >= 2 * len(self._buffers):
                raise WireError(f"{len(self._pending)} batches are under way, expected one for each group")
            self._pending[number] = _Pending()
        return self._pending[number]

    def _check(self, batch: Batch) -> None:
        """Raises WireError for a batch that has no place here."""
        if isinstance(batch, Prefill):
            rows = [(piece.slot, piece.start, len(piece.tokens)) for piece in batch.pieces]
        else:
            rows = [(index, row.start, 1) for index, row in enumerate(batch.rows)]
        places = [slot for slot, _, _ in rows] + [slot for one in batch.copies for slot in (one.source, one.target)]
        ends = [start + count for _, start, count in rows] + [one.length for one in batch.copies]
        least = min([start for _, start, _ in rows] + [one.length for one in batch.copies])
        if not (
            batch.group < len(self._buffers)
            and 0 <= min(places) <= max(places) < self._slots
            and 0 <= least <= max(ends) <= self._max_length
            and len(rows) <= self._slots
        ):
            raise WireError(
                f"a batch of group {batch.group}, slots {min(places)} to {max(places)} and {max(ends)} positions, of "
                f"{len(self._buffers)} groups of {self._slots} slots with {self._max_length} positions"
            )
