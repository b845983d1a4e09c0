"""The memory of a decoder's states: of one batch of sequences, or of the slots that an engine keeps sequences in."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

import numpy as np

from furiosa_llm.runtime.artifact.dimensions import Shape, shape_of
from furiosa_llm.runtime.artifact.dtypes import Array
from furiosa_llm.runtime.artifact.manifest import State
from furiosa_llm.runtime.execution.memory import Block, array_nbytes
from furiosa_llm.runtime.execution.ort import Tensor, wrap
from furiosa_llm.runtime.program.stacking import with_heads_of

CAPACITY_STEP = 256
"""States grow by at least this many positions at a time, and by at least half."""


def grown_capacity(length: int, capacity: int) -> int:
    """The next capacity of states that have `capacity` positions and need `length`."""
    return -(-max(length, capacity + capacity // 2) // CAPACITY_STEP) * CAPACITY_STEP


class StateBuffers:
    """The memory of one state on one rank; `past` is what the next step reads, `present` what it writes.

    In place: one buffer of `capacity` positions, past and present at once; what lies beyond the valid ones is finite,
    because kernels may read it before they mask it. Otherwise two, between which past and present alternate: the
    present of a state that is appended to has the past copied into it, that of a state of a fixed size is all new.
    """

    __slots__ = ("_dtype", "_flat", "_inner", "_length", "_outer", "past", "present", "state")

    def __init__(self, state: State, dtype: str, shape: tuple[int, ...]) -> None:
        self.state = state
        self._dtype = dtype
        dim = len(shape) if state.sequence_dim is None else state.sequence_dim
        self._outer, self._inner = shape[:dim], shape[dim + 1 :]
        self._length = 0  # positions in `present`, once the step that writes it has run
        self._flat = self._allocate(0)
        self.past = self.present = self._tensor(self._flat[0], 0)

    def reserve(self, capacity: int, length: int) -> None:
        """Makes room for `capacity` positions and keeps the first `length`."""
        self._catch_up(length)
        if self.state.mode == "replace":
            return
        kept = self.past.array
        self._flat = self._allocate(capacity)
        self.past = self.present = self._tensor(self._flat[0], capacity if self._in_place else length)
        valid = (slice(None),) * len(self._outer) + (slice(0, length),)
        self.past.array[valid] = kept[valid]

    def rewind(self) -> None:
        """Forgets all positions and keeps the memory."""
        self._length = 0
        if self.state.mode == "replace":
            self._flat[0][...] = 0
        if not self._in_place:
            self.past = self.present = self._tensor(self._flat[0], 0)

    def extend(self, past: int, total: int) -> None:
        """Makes `past` the state of that many positions and `present` the place for `total`; not for those in place."""
        self._catch_up(past)
        self._length = total
        self.present = self._tensor(self._flat[1], total)

    @property
    def _in_place(self) -> bool:
        return self.state.mode == "in_place"

    def _catch_up(self, length: int) -> None:
        """Makes the present of the last step, if it succeeded and so has `length` positions, the past of the next."""
        if self._in_place or self.present is self.past or self._length != length:
            return
        self._flat.reverse()
        self.past = self.present

    def _allocate(self, capacity: int) -> list[Array]:
        shape = (math.prod(self._shape(capacity)),)
        nbytes = array_nbytes(self._dtype, shape)
        found = [Block(nbytes).array(self._dtype, shape) for _ in range(1 if self._in_place else 2)]
        if self.state.mode == "replace":
            found[0][...] = 0
        return found

    def _shape(self, length: int) -> tuple[int, ...]:
        return self._outer if self.state.sequence_dim is None else (*self._outer, length, *self._inner)

    def _tensor(self, flat: Array, length: int) -> Tensor:
        shape = self._shape(length)
        return wrap(flat[: math.prod(shape)].reshape(shape), self._dtype)


Overwritten = Sequence[tuple[Array, Array]]
"""Places in buffers, and what was there."""


class BindsStates(Protocol):
    """What states are bound to; see `BoundProgram`."""

    def bind_input(self, rank: int, name: str, tensor: Tensor) -> None: ...  # noqa: D102

    def bind_output(self, rank: int, name: str, tensor: Tensor) -> None: ...  # noqa: D102

    def array(self, rank: int, name: str) -> Array: ...  # noqa: D102


class _Rows:
    """One state as a row for each sequence: where its batch is, and how a row looks."""

    __slots__ = ("batch_dim", "dtype", "grown_dim", "shape", "state")

    def __init__(self, state: State, dtype: str, shape: Shape, batch: int | None) -> None:
        self.state, self.dtype = state, dtype
        self.batch_dim = shape.index(batch or "batch") if state.batch_dim is None else state.batch_dim
        sizes = shape_of(shape, {"batch": 1, "past": 0, "total": 0})
        self.shape = (*sizes[: self.batch_dim], *sizes[self.batch_dim + 1 :])
        dim = state.sequence_dim
        self.grown_dim = None if dim is None else dim - (dim > self.batch_dim)
        """The dimension of a row that grows."""

    def span(self, start: int, stop: int) -> tuple[slice, ...]:
        """Positions of a row."""
        return () if self.grown_dim is None else ((slice(None),) * self.grown_dim + (slice(start, stop),))

    def of_length(self, length: int) -> tuple[int, ...]:
        """The shape of a row of so many positions."""
        dim = self.grown_dim
        return self.shape if dim is None else (*self.shape[:dim], length, *self.shape[dim + 1 :])


class SlotStates:
    """States in place for the sequences of a group: of each state on each rank one buffer with a row for every slot.

    A step binds consecutive rows of it, as past and present at once. Rows that no sequence has touched take no memory.
    `batch` is the model's, if it is fixed. `stacked` has the ranks whose states are one, by each of them and the name
    of the state: they have one buffer, in which their heads are one behind another. No ranks: no buffer.
    """

    def __init__(
        self,
        states: Sequence[State],
        dtypes: Mapping[str, str],
        shapes: Mapping[str, Shape],
        *,
        ranks: Sequence[int],
        slots: int,
        batch: int | None = None,
        stacked: Mapping[tuple[int, str], tuple[int, ...]] = MappingProxyType({}),
    ) -> None:
        self._places = tuple(
            (rank, _Rows(state, dtypes[state.input], with_heads_of(shapes[state.input], len(group)), batch))
            for state in states
            for rank in ranks
            if (group := stacked.get((rank, state.input), (rank,)))[:1] == (rank,)
        )
        self._slots = slots
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
        for rank, rows in self._places:
            if old and rows.grown_dim is None:
                continue
            shape = (self._slots, *rows.of_length(self._capacity))
            buffer = Block(array_nbytes(rows.dtype, shape)).array(rows.dtype, shape)
            if old:
                kept = self._buffers[rank, rows.state.input][: self._used]
                buffer[: self._used][(slice(None), *rows.span(0, old))] = kept
            self._buffers[rank, rows.state.input] = buffer
        return True

    def copy(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` positions of slot `source` to slot `target`."""
        self._used = max(self._used, target + 1)
        for rank, rows in self._places:
            where = rows.span(0, length)
            buffer = self._buffers[rank, rows.state.input]
            buffer[target][where] = buffer[source][where]

    def touch(self, count: int) -> None:
        """Takes note that the first `count` slots may have something to keep from now on."""
        self._used = max(self._used, count)

    def kept_of(self, slot: int, position: int) -> Overwritten:
        """What `slot` has at `position`; nothing, if no sequence has touched it."""
        if slot >= self._used:
            return ()
        places = [
            self._buffers[rank, rows.state.input][slot][rows.span(position, position + 1)]
            for rank, rows in self._places
        ]
        return [(place, place.copy()) for place in places]

    def bind(self, bound: BindsStates, first: int, count: int) -> None:
        """Binds the rows of slots [first, first + count) as past and present."""
        for rank, state, tensor in self._rows(first, count):
            bound.bind_input(rank, state.input, tensor)
            bound.bind_output(rank, state.output, tensor)

    def _rows(self, first: int, count: int) -> list[tuple[int, State, Tensor]]:
        key = (first, count)
        if key not in self._views:
            self._views[key] = [
                (rank, rows.state, wrap(self._buffers[rank, rows.state.input][first : first + count], rows.dtype))
                for rank, rows in self._places
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
        batch: int | None = None,
        stacked: Mapping[tuple[int, str], tuple[int, ...]] = MappingProxyType({}),
    ) -> None:
        super().__init__(states, dtypes, shapes, ranks=ranks, slots=slots, batch=batch, stacked=stacked)
        self._blocks: dict[tuple[int, str], Block] = {}
        self._windows: dict[str, int] = {}

    def cached(self, past: int) -> int:
        """How many of `past` positions a step is given, of the state that keeps most."""
        growing = {rows.state.input for _, rows in self._places if rows.grown_dim is not None}
        return max((min(past, self._windows.get(name, past)) for name in growing), default=past)

    def stage(self, bound: BindsStates, slots: Sequence[int], past: int) -> None:
        """Binds the `past` positions of `slots`, or as many of the last as the model looks back on.

        A state of a fixed size is all zeros where nothing has been stepped.
        """
        for rank, rows in self._places:
            name = rows.state.input
            given = min(past, self._windows.get(name, past))
            where = rows.span(past - given, past)
            buffer = self._buffers[rank, name]
            taken = self._past(rank, rows, len(slots), given)
            by_row = np.moveaxis(taken, rows.batch_dim, 0)
            for row, slot in enumerate(slots):
                by_row[row] = buffer[slot][where] if past or rows.grown_dim is not None else 0
            bound.bind_input(rank, name, wrap(taken, rows.dtype))

    def finish(self, bound: BindsStates, slots: Sequence[int], past: int, total: int) -> None:
        """Keeps what a step from `past` to `total` positions has added, as far as it gives it."""
        for rank, rows in self._places:
            name = rows.state.input
            whole = min(past, self._windows.get(name, past)) + total - past
            made = np.moveaxis(bound.array(rank, rows.state.output), rows.batch_dim, 0)
            source = target = rows.span(0, 0)
            if rows.grown_dim is not None:
                length = made.shape[rows.grown_dim + 1]
                if length < whole:
                    self._windows[name] = length
                added = min(total - past, length)
                source, target = rows.span(length - added, length), rows.span(total - added, total)
            for row, slot in enumerate(slots):
                self._buffers[rank, name][slot][target] = made[row][source]

    def _past(self, rank: int, rows: _Rows, count: int, length: int) -> Array:
        """Memory for the past of `count` sequences of `length` positions, used again for the next step."""
        one = rows.of_length(length)
        shape = (*one[: rows.batch_dim], count, *one[rows.batch_dim :])
        nbytes = array_nbytes(rows.dtype, shape)
        block = self._blocks.get((rank, rows.state.input))
        if block is None or block.nbytes < nbytes:
            block = self._blocks[rank, rows.state.input] = Block(nbytes + nbytes // 2)
        return block.array(rows.dtype, shape)
