"""The memory of a decoder's states: of one batch of sequences, or of the slots that an engine keeps sequences in."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

from furiosa_llm.runtime.artifact.dimensions import Shape, shape_of
from furiosa_llm.runtime.artifact.dtypes import Array
from furiosa_llm.runtime.artifact.manifest import State
from furiosa_llm.runtime.execution.memory import Block, array_nbytes
from furiosa_llm.runtime.execution.ort import Tensor, wrap

CAPACITY_STEP = 256
"""States grow by at least this many positions at a time, and by at least half."""


def grown_capacity(length: int, capacity: int) -> int:
    """The next capacity of states that have `capacity` positions and need `length`."""
    return -(-max(length, capacity + capacity // 2) // CAPACITY_STEP) * CAPACITY_STEP


class StateBuffers:
    """The memory of one state on one rank; `past` is what the next step reads, `present` what it writes.

    In place: one buffer of `capacity` positions, past and present at once; what lies beyond the valid ones is finite,
    because kernels may read it before they mask it. Append: two, between which past and present alternate, because the
    present has the past copied into it.
    """

    __slots__ = ("_dtype", "_flat", "_in_place", "_inner", "_outer", "past", "present", "state")

    def __init__(self, state: State, dtype: str, shape: tuple[int, ...]) -> None:
        self.state = state
        self._dtype = dtype
        self._in_place = state.mode == "in_place"
        self._outer, self._inner = shape[: state.sequence_dim], shape[state.sequence_dim + 1 :]
        self._flat = self._allocate(0)
        self.past = self.present = self._tensor(self._flat[0], 0)

    def reserve(self, capacity: int, length: int) -> None:
        """Makes room for `capacity` positions and keeps the first `length`."""
        self._catch_up(length)
        kept = self.past.array
        self._flat = self._allocate(capacity)
        self.past = self.present = self._tensor(self._flat[0], capacity if self._in_place else length)
        valid = (slice(None),) * len(self._outer) + (slice(0, length),)
        self.past.array[valid] = kept[valid]

    def rewind(self) -> None:
        """Forgets all positions and keeps the memory."""
        if not self._in_place:
            self.past = self.present = self._tensor(self._flat[0], 0)

    def extend(self, past: int, total: int) -> None:
        """Makes `past` the state of that many positions and `present` the place for `total`; for append states."""
        self._catch_up(past)
        self.present = self._tensor(self._flat[1], total)

    def _catch_up(self, length: int) -> None:
        """Makes the present of the last step, if it succeeded and so has `length` positions, the past of the next."""
        if not self._in_place and self.past.array.shape[self.state.sequence_dim] != length:
            self._flat.reverse()
            self.past = self.present

    def _allocate(self, capacity: int) -> list[Array]:
        shape = (math.prod(self._outer) * capacity * math.prod(self._inner),)
        nbytes = array_nbytes(self._dtype, shape)
        return [Block(nbytes).array(self._dtype, shape) for _ in range(1 if self._in_place else 2)]

    def _tensor(self, flat: Array, length: int) -> Tensor:
        shape = (*self._outer, length, *self._inner)
        return wrap(flat[: math.prod(shape)].reshape(shape), self._dtype)


Overwritten = Sequence[tuple[Array, Array]]
"""Places in buffers, and what was there."""


class BindsStates(Protocol):
    """What states are bound to; see `BoundProgram`."""

    def bind_input(self, rank: int, name: str, tensor: Tensor) -> None: ...  # noqa: D102

    def bind_output(self, rank: int, name: str, tensor: Tensor) -> None: ...  # noqa: D102

    def array(self, rank: int, name: str) -> Array: ...  # noqa: D102


class SlotStates:
    """States in place for the sequences of a group: of each state on each rank one buffer with a row for every slot.

    A step binds consecutive rows of it, as past and present at once. Rows that no sequence has touched take no memory.
    """

    def __init__(
        self,
        states: Sequence[State],
        dtypes: Mapping[str, str],
        shapes: Mapping[str, Shape],
        *,
        ranks: Sequence[int],
        slots: int,
    ) -> None:
        empty = {"batch": slots, "past": 0, "total": 0}
        self._states = tuple(states)
        self._dtypes = dtypes
        self._shapes = {state.input: shape_of(shapes[state.input], empty) for state in states}
        self._ranks = tuple(ranks)
        self._capacity = 0
        self._used = 0
        self._buffers: dict[tuple[int, str], Array] = {}
        self._views: dict[tuple[int, int], list[tuple[int, State, Tensor]]] = {}

    @property
    def capacity(self) -> int:
        """The positions of each row."""
        return self._capacity

    def reserve(self, length: int) -> bool:
        """Makes room for `length` positions in every row, and keeps what there is; whether the buffers are new."""
        if length <= self._capacity:
            return False
        old, self._capacity = self._capacity, grown_capacity(length, self._capacity)
        self._views.clear()
        for state in self._states:
            dim = state.sequence_dim
            shape = self._shapes[state.input]
            shape = (*shape[:dim], self._capacity, *shape[dim + 1 :])
            dtype = self._dtypes[state.input]
            for rank in self._ranks:
                buffer = Block(array_nbytes(dtype, shape)).array(dtype, shape)
                if old:
                    kept = self._buffers[rank, state.input][: self._used]
                    buffer[: self._used][(slice(None),) * dim + (slice(0, old),)] = kept
                self._buffers[rank, state.input] = buffer
        return True

    def copy(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` positions of slot `source` to slot `target`."""
        self._used = max(self._used, target + 1)
        for state in self._states:
            where = (slice(None),) * (state.sequence_dim - 1) + (slice(0, length),)
            for rank in self._ranks:
                buffer = self._buffers[rank, state.input]
                buffer[target][where] = buffer[source][where]

    def touch(self, count: int) -> None:
        """Takes note that the first `count` slots may have something to keep from now on."""
        self._used = max(self._used, count)

    def kept_of(self, slot: int, position: int) -> Overwritten:
        """What `slot` has at `position`; nothing, if no sequence has touched it."""
        if slot >= self._used:
            return ()
        found: list[tuple[Array, Array]] = []
        for state in self._states:
            where = (slice(None),) * (state.sequence_dim - 1) + (slice(position, position + 1),)
            places = [self._buffers[rank, state.input][slot][where] for rank in self._ranks]
            found += [(place, place.copy()) for place in places]
        return found

    def bind(self, bound: BindsStates, first: int, count: int) -> None:
        """Binds the rows of slots [first, first + count) as past and present."""
        for rank, state, tensor in self._rows(first, count):
            bound.bind_input(rank, state.input, tensor)
            bound.bind_output(rank, state.output, tensor)

    def _rows(self, first: int, count: int) -> list[tuple[int, State, Tensor]]:
        key = (first, count)
        if key not in self._views:
            self._views[key] = [
                (rank, state, wrap(self._buffers[rank, state.input][first : first + count], self._dtypes[state.input]))
                for rank in self._ranks
                for state in self._states
            ]
        return self._views[key]


class StagedStates(SlotStates):
    """States that a step appends to: rows of the same buffers, from which a step's past is taken as it is wanted.

    A step binds a past of its own, of exactly the length that the model declares, and onnxruntime allocates the
    present: a model that looks back over a window cuts it to that. Such a model is given no longer past than it gave,
    as if the window were all there is. `finish` puts the positions that the step has added where the next one finds
    them; what was cut off is not kept, and never read again.
    """

    def __init__(
        self,
        states: Sequence[State],
        dtypes: Mapping[str, str],
        shapes: Mapping[str, Shape],
        *,
        ranks: Sequence[int],
        slots: int,
    ) -> None:
        super().__init__(states, dtypes, shapes, ranks=ranks, slots=slots)
        self._blocks: dict[tuple[int, str], Block] = {}
        self._windows: dict[str, int] = {}

    def cached(self, past: int) -> int:
        """How many of `past` positions a step is given, of the state that keeps most."""
        return max((min(past, self._windows.get(state.input, past)) for state in self._states), default=past)

    def stage(self, bound: BindsStates, slots: Sequence[int], past: int) -> None:
        """Binds the `past` positions of `slots`, or as many of the last as the model looks back on."""
        for state in self._states:
            given = min(past, self._windows.get(state.input, past))
            where = (slice(None),) * (state.sequence_dim - 1) + (slice(past - given, past),)
            for rank in self._ranks:
                buffer = self._buffers[rank, state.input]
                taken = self._past(rank, state, len(slots), given)
                for row, slot in enumerate(slots):
                    taken[row] = buffer[slot][where]
                bound.bind_input(rank, state.input, wrap(taken, self._dtypes[state.input]))

    def finish(self, bound: BindsStates, slots: Sequence[int], past: int, total: int) -> None:
        """Keeps what a step from `past` to `total` positions has added, as far as it gives it."""
        for state in self._states:
            dim = state.sequence_dim - 1
            whole = min(past, self._windows.get(state.input, past)) + total - past
            for rank in self._ranks:
                made = bound.array(rank, state.output)
                length = made.shape[state.sequence_dim]
                if length < whole:
                    self._windows[state.input] = length
                added = min(total - past, length)
                source = (slice(None),) * dim + (slice(length - added, length),)
                target = (slice(None),) * dim + (slice(total - added, total),)
                for row, slot in enumerate(slots):
                    self._buffers[rank, state.input][slot][target] = made[row][source]

    def _past(self, rank: int, state: State, rows: int, length: int) -> Array:
        """Memory for the past of `rows` sequences of `length` positions, used again for the next step."""
        dim = state.sequence_dim
        one = self._shapes[state.input]
        shape = (rows, *one[1:dim], length, *one[dim + 1 :])
        dtype = self._dtypes[state.input]
        nbytes = array_nbytes(dtype, shape)
        block = self._blocks.get((rank, state.input))
        if block is None or block.nbytes < nbytes:
            block = self._blocks[rank, state.input] = Block(nbytes + nbytes // 2)
        return block.array(dtype, shape)
