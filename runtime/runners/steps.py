"""One group's batches as runs of the stages: what is fed, which slots are bound, and where the logits are."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import numpy as np

from furiosa_llm.runtime.adapters.adapter import Adapter, key_of
from furiosa_llm.runtime.adapters.bank import Beside, StepAdapters
from furiosa_llm.runtime.artifact.adapters.graph import ROWS
from furiosa_llm.runtime.artifact.dimensions import GROWING
from furiosa_llm.runtime.artifact.dtypes import Array
from furiosa_llm.runtime.errors import UnsupportedError
from furiosa_llm.runtime.execution.binding import Allocate, BoundProgram, RunsLanes, private_block
from furiosa_llm.runtime.execution.counters import Counters, count_run, count_send, rows_of
from furiosa_llm.runtime.execution.feeds import StepFeeds, TokenIds
from furiosa_llm.runtime.execution.memory import Block
from furiosa_llm.runtime.execution.ort import Tensor
from furiosa_llm.runtime.execution.scores import by_position
from furiosa_llm.runtime.execution.states import Overwritten, SlotStates, StagedStates
from furiosa_llm.runtime.program.interruption import Interruption
from furiosa_llm.runtime.program.segments import growing_values
from furiosa_llm.runtime.program.serving_graph import LAST_POSITIONS, WANTED
from furiosa_llm.runtime.runners.batch import NO_COMPANIONS, Batch, Companions, Decode, Piece, Prefill
from furiosa_llm.runtime.runners.loaded_model import LoadedModel, StageProgram, Traits

WORTH_A_STEP = 4
"""So many tokens of padding for each sequence cost no more than a step of its own; measured, see docs/execution.md."""

_Placed = tuple[Piece, range]
"""A piece, and the rows of the batch's logits that are its own."""

Occupy = Callable[[int, BoundProgram], AbstractContextManager[None]]
"""`occupy(stage, bound)` is entered while a batch runs on a stage."""

Received = Callable[[int, str, int], Tensor]
"""`received(stage, name, rank)` is the value `name` of an earlier stage, as `rank` of a later one has it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One run of the model: `token_ids` [sequences, new tokens] after `starts` tokens, of sequences in `slots`.

    `lengths` are the new tokens of each sequence: what follows them is padding. `wanted` are the positions whose logits
    are computed, counted through `token_ids`; those of the first ones belong to the batch's rows `rows`. `adapters` are
    those of the sequences. If it is `twice`,
    `token_ids`, `lengths` and `starts` have the one sequence once more: its companion in the next slot, whose logits
    nobody reads. So they have the last sequence `padding` times more, for a model with a batch of its own.
    """

    slots: tuple[int, ...]
    rows: tuple[int, ...]
    token_ids: TokenIds
    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    wanted: tuple[int, ...]
    adapters: tuple[Adapter | None, ...]
    twice: bool = False
    padding: int = 0

    def sizes(self, cached: int) -> dict[str, int]:
        """The sizes of the step's dynamic dimensions, after `cached` positions."""
        batch, sequence = self.token_ids.shape
        return {
            "batch": batch,
            "sequence": sequence,
            "past": cached,
            "total": cached + sequence,
            "wanted": len(self.wanted),
        }


def steps_of(batch: Batch, traits: Traits, companions: Companions = NO_COMPANIONS) -> list[Step]:
    """The runs of the model that make up `batch`."""
    steps = [_with_companions(step, companions) for step in _steps(batch, traits)]
    return steps if traits.batch is None else [_padded(step, traits.batch) for step in steps]


def _padded(step: Step, batch: int) -> Step:
    """`step` with so many rows as every step has."""
    missing = batch - len(step.token_ids)
    return replace(
        step,
        token_ids=np.concatenate([step.token_ids, *[step.token_ids[-1:]] * missing]),
        starts=step.starts + step.starts[-1:] * missing,
        lengths=step.lengths + step.lengths[-1:] * missing,
        padding=missing,
    )


def _with_companions(step: Step, companions: Companions) -> Step:
    """`step` with the companion that a lone sequence gets in a step of one token, as all decode steps are."""
    if not companions.lone or step.token_ids.size > 1:
        return step
    token_ids = np.concatenate([step.token_ids] * 2)
    return replace(
        step, token_ids=token_ids, starts=step.starts * 2, lengths=step.lengths * 2, wanted=(0, 1), twice=True
    )


def _steps(batch: Batch, traits: Traits) -> list[Step]:
    if isinstance(batch, Prefill):
        return _prefill_steps(batch, traits)
    alike: dict[tuple[int, int], list[int]] = {}
    for index, row in enumerate(batch.rows):
        start, adapter = 0 if traits.rows == "ragged" else row.start, 0 if traits.mixes else key_of(row.adapter)
        alike.setdefault((start, adapter), []).append(index)
    runs = [run for rows in alike.values() for run in (_runs(rows) if traits.in_place else [rows])]
    most = traits.batch or max(map(len, runs))
    return [_decode(batch, run[i : i + most]) for run in runs for i in range(0, len(run), most)]


def _prefill_steps(batch: Prefill, traits: Traits) -> list[Step]:
    """Pieces in consecutive slots in one step, where they may be and padding costs less than steps of their own."""
    ends = itertools.accumulate(len(piece.wanted) for piece in batch.pieces)
    placed = [(piece, range(end - len(piece.wanted), end)) for piece, end in zip(batch.pieces, ends, strict=True)]
    if traits.singly:
        return [_prefill([one]) for piece, rows in placed for one in _singly(piece, rows)]
    runs: list[list[_Placed]] = []
    for one in sorted(placed, key=lambda pair: pair[0].slot):
        if runs and _fits([piece for piece, _ in runs[-1]], one[0], traits):
            runs[-1].append(one)
        else:
            runs.append([one])
    return [_prefill(run) for run in runs]


def _singly(piece: Piece, rows: range) -> Iterator[_Placed]:
    """A piece as one for each token."""
    places = dict(zip(piece.wanted, rows, strict=True))
    for index, token in enumerate(piece.tokens):
        place = range(places[index], places[index] + 1) if index in places else range(0)
        yield replace(piece, start=piece.start + index, tokens=(token,)), place


def _fits(run: Sequence[Piece], piece: Piece, traits: Traits) -> bool:
    """Whether a piece may be in the step of a run of pieces, and had better be.

    Attention takes several sequences of several tokens only where none of them has a past.
    """
    last, sizes = run[-1], [len(one.tokens) for one in (*run, piece)]
    if last.start or piece.start or len(run) == traits.batch or (traits.in_place and piece.slot != last.slot + 1):
        return False
    if not traits.mixes and key_of(piece.adapter) != key_of(last.adapter):
        return False
    padding = max(sizes) * len(sizes) - sum(sizes)
    return not padding or (traits.pads and min(sizes) > 1 and padding <= WORTH_A_STEP * len(run))


def _prefill(run: Sequence[_Placed]) -> Step:
    pieces = [piece for piece, _ in run]
    longest = max(len(piece.tokens) for piece in pieces)
    token_ids = np.zeros((len(run), longest), dtype=np.int64)
    wanted: list[int] = []
    for index, (piece, rows) in enumerate(run):
        count = len(piece.tokens)
        token_ids[index, :count] = piece.tokens
        wanted += range(index * longest + count - len(rows), index * longest + count)
    return Step(
        slots=tuple(piece.slot for piece in pieces),
        rows=tuple(row for _, rows in run for row in rows),
        token_ids=token_ids,
        starts=tuple(piece.start for piece in pieces),
        lengths=tuple(len(piece.tokens) for piece in pieces),
        wanted=tuple(wanted) or (len(pieces[0].tokens) - 1,),
        adapters=tuple(piece.adapter for piece in pieces),
    )


def _decode(batch: Decode, rows: Sequence[int]) -> Step:
    return Step(
        slots=tuple(rows),
        rows=tuple(rows),
        token_ids=np.array([[batch.rows[row].token] for row in rows], dtype=np.int64),
        starts=tuple(batch.rows[row].start for row in rows),
        lengths=(1,) * len(rows),
        wanted=tuple(range(len(rows))),
        adapters=tuple(batch.rows[row].adapter for row in rows),
    )


def _runs(rows: Sequence[int]) -> list[list[int]]:
    """`rows`, ascending, as runs of consecutive ones."""
    runs: list[list[int]] = []
    for row in rows:
        if runs and runs[-1][-1] == row - 1:
            runs[-1].append(row)
        else:
            runs.append([row])
    return runs


def own_ranks(model: LoadedModel, program: StageProgram) -> tuple[int, ...]:
    """The ranks whose lanes are in this process."""
    return tuple(rank for lane in model.own for rank in program.lanes.ranks[lane])


class Use:
    """One form of step (its number of rows, one token or several) on one stage: bindings and the memory of values."""

    def __init__(
        self,
        model: LoadedModel,
        program: StageProgram,
        crew: RunsLanes,
        allocate: Allocate,
        interruption: Interruption,
    ) -> None:
        graph = program.graph
        self.states_bound: tuple[int, int] | None = None
        presents = frozenset(state.output for state in graph.states)
        in_place = model.traits.in_place
        # A window may cut what grows: then its shape is another than the program says, from some length on.
        unknown = presents | growing_values(program.lanes.program, GROWING)
        self.bound = BoundProgram(
            program.lanes,
            program.sessions,
            crew,
            external=presents if in_place else frozenset(),
            unbound=frozenset() if in_place else unknown,
            growing=GROWING,
            own=model.own,
            allocate=allocate,
            interruption=interruption,
            check=model.check,
        )
        self._read = {value.name for value in graph.model.graph.input}
        self._feeds = StepFeeds([info for info in model.step_inputs if info.name in self._read])
        for name in self._read & model.defaults.keys():
            self.bound.bind_shared(name, model.defaults[name])
        self._adapters: Beside | None = None
        self._received = graph.received
        self._ranks = own_ranks(model, program)

    def prepare(self, step: Step, adapters: StepAdapters, cached: int | None, received: Received) -> None:
        """Gives everything but the states its place for `step`, of whose past `cached` positions are there, or all."""
        self.bound.resize({**step.sizes(max(step.starts) if cached is None else cached), **adapters.beside.sizes})
        if adapters.beside is not self._adapters:
            self._adapters = adapters.beside
            for name in self._read & self._adapters.arrays.keys():
                self.bound.bind_shared(name, self._adapters.arrays[name])
        if adapters.mask is not None and ROWS in self._read:
            self.bound.bind_shared(ROWS, adapters.mask)
        for name, array in self._fed(step, cached):
            self.bound.bind_shared(name, array)
        for name, stage in self._received.items():
            for rank in self._ranks:
                self.bound.bind_input(rank, name, received(stage, name, rank))

    def _fed(self, step: Step, cached: int | None) -> Iterator[tuple[str, Array]]:
        """Writes what `step` is fed, and gives what has to be bound: arrays that are others than in the last step."""
        yield from self._feeds.update(step.token_ids, step.starts, lengths=step.lengths, cached=cached)
        if WANTED in self._read:
            yield from self._feeds.keep(WANTED, np.array(step.wanted, dtype=np.int64))
        if LAST_POSITIONS in self._read:
            last = np.array(step.starts, dtype=np.int32) + np.array(step.lengths, dtype=np.int32) - np.int32(1)
            yield from self._feeds.keep(LAST_POSITIONS, last)

    def received_nbytes(self, received: Received) -> int:
        """What each PE of the stage receives of earlier stages in a run."""
        first = self._ranks[0]
        return sum(received(stage, name, first).array.nbytes for name, stage in self._received.items())


class StageBuffers:
    """What one group has on one stage: its states, and its uses of the stage by the form of the step."""

    def __init__(
        self,
        model: LoadedModel,
        program: StageProgram,
        *,
        slots: int,
        crew: RunsLanes,
        allocate: Allocate,
        interruption: Interruption,
    ) -> None:
        self._model = model
        self._interruption = interruption
        self._program = program
        self._crew = crew
        self._allocate = allocate
        kind = SlotStates if model.traits.in_place else StagedStates
        self._states = kind(
            program.graph.states,
            {info.name: info.dtype for info in model.interface.inputs},
            model.interface.state_shapes,
            ranks=own_ranks(model, program),
            slots=slots + model.companions.lone,
            batch=model.traits.batch,
            stacked=program.lanes.stacked,
        )
        self._overwritten: Overwritten = ()
        self._uses: dict[tuple[int, bool], Use] = {}
        self._blocks: dict[int, Block] = {}

    def copy(self, batch: Batch) -> None:
        """Makes the copies between slots that come before `batch`."""
        for one in batch.copies:
            self._states.copy(one.source, one.target, one.length)

    def use(self, step: Step, adapters: StepAdapters, received: Received) -> Use:
        """What `step` runs on, all bound, what earlier stages gave included."""
        rows, sequence = step.token_ids.shape
        key = (rows, sequence == 1)
        if key not in self._uses:
            self._uses[key] = Use(self._model, self._program, self._crew, self._shared_block, self._interruption)
        use = self._uses[key]
        past = max(step.starts)
        grown = self._states.reserve(past + sequence)
        self._states.touch(max(step.slots) + 1)
        if isinstance(self._states, StagedStates):
            use.prepare(step, adapters, self._states.cached(past), received)
            self._states.stage(use.bound, step.slots * (2 if step.twice else 1) + step.slots[-1:] * step.padding, past)
            return use
        use.prepare(step, adapters, None, received)
        if grown:
            # Uses keep what is bound to them, and would keep the buffers that there were before.
            for other in self._uses.values():
                if other.states_bound is not None:
                    self._states.bind(other.bound, *other.states_bound)
        if step.twice:
            self._overwritten = self._states.kept_of(step.slots[0] + 1, step.starts[0])
        place = (step.slots[0], rows)
        if use.states_bound != place:
            self._states.bind(use.bound, *place)
            use.states_bound = place
        return use

    def _shared_block(self, lane: int, nbytes: int) -> Block:
        """The memory of a lane's values, the same for all uses: one of them runs at a time."""
        block = self._blocks.get(lane)
        if block is None or block.nbytes < nbytes:
            block = self._blocks[lane] = self._allocate(lane, nbytes + nbytes // 2)
        return block

    def finish(self, step: Step, use: Use) -> None:
        """Keeps what `step`, which has run, has added to the states, and takes back what its companion has."""
        for place, kept in self._overwritten:
            place[...] = kept
        self._overwritten = ()
        if isinstance(self._states, StagedStates):
            past = step.starts[0]
            self._states.finish(use.bound, step.slots, past, past + step.token_ids.shape[1])


class Results:
    """The logits of a batch, of those of its `steps`."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self.steps = steps
        self._logits: Array | None = None

    def add(self, step: Step, logits: Array) -> None:
        """Takes the logits of `step`, which the next step may overwrite if there are several."""
        if len(self.steps) == 1 and step.rows == tuple(range(len(step.rows))):
            self._logits = logits
            return
        if self._logits is None:
            rows = sum(len(one.rows) for one in self.steps)
            self._logits = np.empty((rows, logits.shape[1]), dtype=logits.dtype)
        if logits.size:
            self._logits[list(step.rows)] = logits

    @property
    def logits(self) -> Array:
        """`[rows, vocabulary]`, once every step has run."""
        assert self._logits is not None, "a batch of no step"
        return self._logits


class GroupRunner:
    """The batches of one group, one after another, through all stages; `counters` has a row for each of these."""

    def __init__(
        self,
        model: LoadedModel,
        *,
        slots: int,
        crew: RunsLanes,
        counters: Counters,
        allocate: Allocate = private_block,
    ) -> None:
        self._model = model
        self._rows = rows_of(counters)
        self.interruption = Interruption()
        self._memory = [
            StageBuffers(model, program, slots=slots, crew=crew, allocate=allocate, interruption=self.interruption)
            for program in model.programs
        ]

    def run(self, batch: Batch, occupy: Occupy) -> Array:
        """The logits of `batch`, `[rows, vocabulary]`, in memory that the next one overwrites; see `Runner`.

        A process that has not the first lane gives no rows.
        """
        for memory in self._memory:
            memory.copy(batch)
        results = Results(steps_of(batch, self._model.traits, self._model.companions))
        for step in results.steps:
            results.add(step, self._step(step, occupy))
        return results.logits

    def _step(self, step: Step, occupy: Occupy) -> Array:
        uses: list[Use] = []

        def received(stage: int, name: str, rank: int) -> Tensor:
            return uses[stage].bound.tensor(rank, name)

        adapters = adapters_of_step(self._model, step)
        for stage, (memory, row) in enumerate(zip(self._memory, self._rows, strict=True)):
            left = time.perf_counter_ns()
            use = memory.use(step, adapters, received)
            with occupy(stage, use.bound):
                started = time.perf_counter_ns()
                use.bound.run()
                count_run(row, started)
            use.bound.count(row)
            if stage:
                count_send(row, use.received_nbytes(received), started - left)
            memory.finish(step, use)
            uses.append(use)
        if 0 not in self._model.own:
            return np.empty((0, 0), dtype=np.float32)
        return logits_of(self._model, step, uses[-1])


def adapters_of_step(model: LoadedModel, step: Step) -> StepAdapters:
    """What `step` is given of adapters."""
    missing = len(step.token_ids) - len(step.adapters)
    return model.bank.of(step.adapters + step.adapters[-1:] * missing)


def logits_of(model: LoadedModel, step: Step, last: Use) -> Array:
    """The logits of the batch's rows `step.rows`, `[rows, vocabulary]`, of the step's run on the last stage."""
    logits = last.bound.array(0, model.logits.name)
    if not model.traits.selects:
        logits = _wanted(by_position(model.logits, logits, len(step.token_ids)), step)
    return logits.reshape(-1, logits.shape[-1])[: len(step.rows)]


def _wanted(logits: Array, step: Step) -> Array:
    """The logits of the wanted positions, of all that the model gives."""
    positions = step.token_ids.shape[1]
    only_last = logits.shape[1] < positions
    logits = logits.reshape(-1, logits.shape[-1])
    if only_last:
        if any(place % positions != positions - 1 for place in step.wanted):
            raise UnsupportedError("the model gives the last position's logits only; ask for no others")
        return logits[[place // positions for place in step.wanted]]
    return logits[list(step.wanted)]
