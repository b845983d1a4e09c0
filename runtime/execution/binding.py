"""A program bound to memory: every input and output of every segment on every lane has its place before a run starts.

A run then is a fixed list of `run_with_iobinding` calls, numpy operations and barriers for each lane. Changing a
dynamic size rebinds what depends on it and nothing else. A value whose shape the program does not give is allocated by
onnxruntime in each run and passed on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import onnxruntime

from furiosa_llm.runtime.artifact.dimensions import parse_dimension, shape_of
from furiosa_llm.runtime.artifact.dtypes import Array
from furiosa_llm.runtime.errors import ExecutionError, UnsupportedError
from furiosa_llm.runtime.execution.collectives import ArraySum, gather_operations, reduce_operations, run_operations
from furiosa_llm.runtime.execution.counters import CollectiveMeter, Row, kind_index
from furiosa_llm.runtime.execution.driver import Body, Waits
from furiosa_llm.runtime.execution.exchange import Exchanger, LaneExchange
from furiosa_llm.runtime.execution.memory import Block, array_nbytes, lifetimes, place
from furiosa_llm.runtime.execution.ort import (
    ORT_ERRORS,
    RawBinding,
    RawTensor,
    Tensor,
    let_allocate,
    unwrap,
    wrap,
)
from furiosa_llm.runtime.execution.sessions import SectionSessions, ranks_text
from furiosa_llm.runtime.program.interruption import Interruption
from furiosa_llm.runtime.program.lanes import Exchange, Lanes, Sum, parts_of
from furiosa_llm.runtime.program.segments import CollectiveCall, growing_values

Bind = Callable[[str, RawTensor], None]
Allocate = Callable[[int, int], Block]
"""Memory for the values of a lane: `allocate(lane, nbytes)`."""


class RunsLanes(Protocol):
    """What steps lanes: the threads of a `Crew`, or one of several processes."""

    def run(self, body: Body, lanes: int) -> None:
        """Calls `body` on as many threads as there are for it; see `Crew.run`."""
        ...


def private_block(_: int, nbytes: int) -> Block:
    """Memory that no other process sees."""
    return Block(nbytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class _BoundSection:
    """What one lane does in one section.

    `run` is None if there is nothing to compute, `exchange` if there is nothing to exchange.

    `collect` are the outputs, by position, that onnxruntime allocates in each run; `allocated` are exchanges whose
    shapes are known only when the segments have run.
    """

    run: Callable[[RawBinding, onnxruntime.RunOptions], None] | None
    binding: RawBinding | None
    collect: tuple[tuple[int, str], ...]
    exchange: LaneExchange | None
    allocated: tuple[Exchange, ...]


class BoundProgram:
    """The bindings and the memory of one user of a program; several may share the sessions, one runs at a time.

    The caller binds the graph inputs and the outputs named `external`, calls `resize` with the dynamic sizes and then
    `run`; `array` gives any other output. Outputs named `unbound` are allocated by onnxruntime whatever their shape.
    Values whose shape depends on the dimensions `growing` have memory of their own, so that these may change in each
    run at little cost. `own` are the lanes that this process steps, None for all; what they exchange with others lies
    in the memory that `allocate` gives. `interruption` ends runs from another thread; `check` is called before each,
    and raises what speaks against it.
    """

    def __init__(
        self,
        lanes: Lanes,
        sessions: Sequence[SectionSessions],
        crew: RunsLanes,
        *,
        external: frozenset[str] = frozenset(),
        unbound: frozenset[str] = frozenset(),
        growing: frozenset[str] = frozenset(),
        own: Collection[int] | None = None,
        allocate: Allocate = private_block,
        interruption: Interruption | None = None,
        check: Callable[[], None] | None = None,
    ) -> None:
        self._lanes = lanes
        self.interruption = interruption or Interruption()
        self._check = check
        self._program = lanes.program
        self._crew = crew
        self._sessions = sessions
        self._allocate = allocate
        self._own = tuple(range(len(lanes.ranks)) if own is None else own)
        self._growing_names = growing
        self._lifetimes = lifetimes(lanes)
        made = self._lifetimes.keys()
        external_values = self._on_ranks(external)
        depending = self._on_ranks(growing_values(self._program, growing))
        self._growing = (depending & made) - external_values
        self._unbound = self._shapeless(self._on_ranks(unbound), external_values)
        unknown = {e.out for section in lanes.sections for e in section.exchanges} & self._unbound
        if len(self._own) < len(lanes.ranks) and unknown:
            raise UnsupportedError(
                f"the shape of {min(unknown)!r:.80} is known only as the program runs: its PEs cannot be spread over "
                f"several processes; use threads"
            )
        self._growing -= self._unbound
        self._placed = made - external_values - self._growing - self._unbound
        self._sizes: dict[str, int] = {}
        self._tensors: list[dict[str, Tensor]] = [{} for _ in lanes.ranks]
        self._inputs_of: list[dict[str, list[Bind]]] = [{} for _ in lanes.ranks]
        self._outputs_of: list[dict[str, RawBinding]] = [{} for _ in lanes.ranks]
        self._bindings = [self._bind_section(index) for index in range(len(lanes.sections))]
        self._blocks: dict[int, Block] = {}
        self._growing_blocks: dict[tuple[int, str], Block] = {}
        self._sections: list[list[_BoundSection]] = []
        calls = [call for section in self._program.sections for call in section.collectives]
        self._meter = CollectiveMeter(
            [call.collective.kind for call in calls],
            [
                [call.collective.kind for call in {e.call.collective.id: e.call for e in section.exchanges}.values()]
                for section in lanes.sections
            ],
        )
        results = [self._result(call) for call in calls]
        self._steady = [one for one in results if one[1] not in depending | self._unbound]
        self._varying = [one for one in results if one not in self._steady]
        self._steady_nbytes = [0, 0]
        self.section_of_lane: list[int] | npt.NDArray[np.int64] = [0] * len(lanes.ranks)
        """The section that each lane is in, or was in last."""

    def bind_shared(self, name: str, array: Array) -> None:
        """Binds the graph input `name` to `array` on every rank; the array may be written between runs."""
        tensor = wrap(array, self._program.types[name].dtype)
        lanes = self._lanes
        for lane, named in {(lanes.lane_of(rank), lanes.name(rank, name)) for rank in range(lanes.mesh.size)}:
            self._bind_input(lane, named, tensor)

    def bind_input(self, rank: int, name: str, tensor: Tensor) -> None:
        """Binds the graph input `name` of `rank` to `tensor`, which has the rank's local shape."""
        self._bind_input(self._lanes.lane_of(rank), self._lanes.name(rank, name), tensor)

    def bind_output(self, rank: int, name: str, tensor: Tensor) -> None:
        """Binds the output `name` of `rank`, and whatever reads it, to `tensor`, which has the rank's local shape."""
        self._bind_output(self._lanes.lane_of(rank), self._lanes.name(rank, name), tensor)

    def array(self, rank: int, name: str) -> Array:
        """The output `name` of `rank`: memory that the next run may overwrite."""
        return self.tensor(rank, name).array

    def tensor(self, rank: int, name: str) -> Tensor:
        """What is bound to `name` of `rank`."""
        return self._tensors[self._lanes.lane_of(rank)][self._lanes.name(rank, name)]

    def progress(self) -> str:
        """Which segment the lanes are in, and the last collective that all of them have done."""
        sections = self._lanes.sections
        behind = min(int(self.section_of_lane[lane]) for lane in self._own)
        done = [e.call.collective.id for section in sections[:behind] for e in section.exchanges]
        lanes = ", ".join(
            f"{ranks_text(self._lanes.ranks[lane])} in segment {self.section_of_lane[lane]} of {len(sections)}"
            for lane in self._own
        )
        return f"{lanes}; last collective done: {done[-1] if done else 'none'}"

    def resize(self, sizes: Mapping[str, int]) -> None:
        """Gives every value its place for the dynamic `sizes`."""
        changed = {name for name, size in sizes.items() if self._sizes.get(name) != size}
        self._sizes = dict(sizes)
        if not self._sections or not changed <= self._growing_names:
            self._place_all()
            changed = set(sizes)
        for name in self._growing:
            shape = self._lanes.types[name].shape or ()
            if any(changed.intersection(parse_dimension(dim).names) for dim in shape if isinstance(dim, str)):
                self._grow(name)

    def run(self) -> None:
        """Runs the program once; raises ExecutionError, naming segment and ranks, if onnxruntime fails."""
        self.interruption.check()
        if self._check is not None:
            self._check()
        self._meter.reset()
        self._crew.run(self._drive, len(self._own))

    def count(self, row: Row) -> None:
        """Adds to the counters in `row` what the collectives of the last run took."""
        nbytes = self._steady_nbytes
        if self._varying:
            nbytes = self._received_nbytes(self._varying, nbytes)
        self._meter.count(row, nbytes)

    def _drive(self, shares: Sequence[int], member: int, barrier: Waits) -> None:
        """Steps the lanes `shares` (positions among the lanes of this process) through the whole program."""
        mine = [(self._own[share], self._sections[share]) for share in shares]
        spent, now = self._meter.begin(), time.perf_counter_ns
        for index, kind in enumerate(self._meter.kinds):
            for lane, sections in mine:
                self.section_of_lane[lane] = index
                self._run_segment(index, lane, sections[index])
            if kind is None:
                continue
            started = now()
            for _, sections in mine:
                if (exchange := sections[index].exchange) is not None and exchange.before:
                    run_operations(exchange.before)
            barrier.wait(member)
            late = False
            for lane, sections in mine:
                section = sections[index]
                if section.exchange is not None:
                    run_operations(section.exchange.after)
                    late |= section.exchange.late_barrier
                if section.allocated:
                    self._exchange_allocated(lane, section.allocated)
            if late:
                barrier.wait(member)
            spent[kind] += now() - started

    def _run_segment(self, index: int, lane: int, section: _BoundSection) -> None:
        if section.run is None or section.binding is None:
            return
        try:
            section.run(section.binding, self.interruption.options)
        except ORT_ERRORS as error:
            self.interruption.check()
            where = ranks_text(self._lanes.ranks[lane])
            raise ExecutionError(f"segment {index} failed on {where}: {error}") from error
        if section.collect:
            self._collect(lane, section.binding, section.collect)

    def _collect(self, lane: int, binding: RawBinding, collect: Sequence[tuple[int, str]]) -> None:
        """Passes on the outputs that onnxruntime has allocated, and has it allocate new ones in the next run."""
        outputs = binding.get_outputs()
        for position, name in collect:
            self._bind_input(lane, name, unwrap(outputs[position], self._lanes.types[name].dtype))
            let_allocate(binding, name)

    def _exchange_allocated(self, lane: int, exchanges: Sequence[Exchange]) -> None:
        for exchange in exchanges:
            if lane not in exchange.lanes:
                continue
            dtype = self._lanes.types[exchange.out].dtype
            parts = [self._tensors[part.lane][part.name].array for part in parts_of(exchange)]
            shape = list(parts[0].shape)
            if exchange.total is not None:
                out = Block(array_nbytes(dtype, tuple(shape))).array(dtype, tuple(shape))
                run_operations(reduce_operations(self._arrays_of(exchange.total), out))
            else:
                dim = exchange.call.collective.dim or 0
                shape[dim] *= len(parts)
                out = np.empty(shape, dtype=parts[0].dtype)
                for position, part in enumerate(parts):
                    run_operations(gather_operations(part, position, out, dim))
            self._bind_input(lane, exchange.out, wrap(out, dtype))

    def _arrays_of(self, total: Sum) -> ArraySum:
        if isinstance(total, tuple):
            return (self._arrays_of(total[0]), self._arrays_of(total[1]))
        return self._tensors[total.lane][total.name].array

    # -- counting ----------------------------------------------------------------------------------------------

    def _result(self, call: CollectiveCall) -> tuple[int, str]:
        """The kind of a collective, and the name of its result in the first of this process's lanes."""
        first = self._lanes.ranks[self._own[0]][0]
        return kind_index(call.collective.kind), self._lanes.name(first, call.output)

    def _received_nbytes(self, results: Sequence[tuple[int, str]], before: Sequence[int] = (0, 0)) -> list[int]:
        """By kind of collective what a PE receives of these `results`, added to what is known `before`."""
        found, tensors = list(before), self._tensors[self._own[0]]
        for kind, name in results:
            if name in self._unbound:
                found[kind] += tensors[name].array.nbytes
            else:
                type_ = self._lanes.types[name]
                found[kind] += array_nbytes(type_.dtype, shape_of(type_.shape or (), self._sizes))
        return found

    # -- binding -----------------------------------------------------------------------------------------------

    def _bind_input(self, lane: int, name: str, tensor: Tensor) -> None:
        self._tensors[lane][name] = tensor
        for bind in self._inputs_of[lane].get(name, ()):
            bind(name, tensor.raw)

    def _bind_output(self, lane: int, name: str, tensor: Tensor) -> None:
        self._bind_input(lane, name, tensor)
        binding = self._outputs_of[lane].get(name)
        if binding is not None:
            binding.bind_ortvalue_output(name, tensor.raw)

    def _bind_section(self, index: int) -> list[RawBinding | None]:
        """The bindings of a section's segments by lane, with outputs in the order of the segment."""
        bindings: list[RawBinding | None] = []
        for lane, (session, segment) in enumerate(
            zip(self._sessions[index], self._lanes.sections[index].segments, strict=True)
        ):
            if session is None or segment is None:
                bindings.append(None)
                continue
            binding = session.binding()
            for name in segment.outputs:
                let_allocate(binding, name)
                self._outputs_of[lane][name] = binding
            for name in segment.inputs:
                self._inputs_of[lane].setdefault(name, []).append(binding.bind_ortvalue_input)
            bindings.append(binding)
        return bindings

    def _on_ranks(self, names: Collection[str]) -> frozenset[str]:
        """The lanes' names of the program's values `names`, on all ranks."""
        return frozenset(self._lanes.name(rank, name) for name in names for rank in range(self._lanes.mesh.size))

    def _shapeless(self, unbound: frozenset[str], external: frozenset[str]) -> frozenset[str]:
        """The values that a run must allocate: `unbound`, values of unknown shape, and exchanges that read such."""
        types, is_known = self._lanes.types, self._program.has_known_shape
        shapeless = {name for name in self._lifetimes if name in unbound or not is_known(types[name])}
        for section in self._lanes.sections:
            for exchange in section.exchanges:
                parts = {part.name for part in parts_of(exchange)}
                odd = {*shapeless, *external, *self._growing} | (parts - self._lifetimes.keys())
                if parts & odd or exchange.out in self._growing:
                    shapeless.add(exchange.out)
        return frozenset(shapeless)

    # -- placing -----------------------------------------------------------------------------------------------

    def _place_all(self) -> None:
        """Places all values but the growing ones, and binds them."""
        shapes = {name: shape_of(self._lanes.types[name].shape or (), self._sizes) for name in self._placed}
        offsets = [self._offsets(lane, shapes) for lane in range(len(self._lanes.ranks))]

        def allocate(lane: int, name: str) -> Array:
            return self._blocks[lane].array(self._lanes.types[name].dtype, shapes[name], offsets[lane][name])

        arrays: list[dict[str, Array]] = [{} for _ in self._lanes.ranks]
        exchanges = list(self._exchange_all(arrays, allocate))
        for lane, named in enumerate(arrays):
            for name, array in named.items():
                self._bind_output(lane, name, wrap(array, self._lanes.types[name].dtype))
        self._sections = [
            [self._bound_section(lane, index, exchange) for index, exchange in enumerate(exchanges)]
            for lane in self._own
        ]
        self._steady_nbytes = self._received_nbytes(self._steady)

    def _offsets(self, lane: int, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        """Where the values of a lane lie in its block, which is made anew if it is too small."""
        mine = [
            (name, array_nbytes(self._lanes.types[name].dtype, shapes[name]), lifetime)
            for name, lifetime in self._lifetimes.items()
            if lane in lifetime.lanes and name in shapes
        ]
        offsets, nbytes = place(mine)
        known = self._blocks.get(lane)
        if known is None or nbytes > known.nbytes:
            self._blocks[lane] = self._allocate(lane, nbytes)
        return offsets

    def _exchange_all(
        self, arrays: list[dict[str, Array]], allocate: Callable[[int, str], Array]
    ) -> Iterator[list[LaneExchange] | None]:
        """Gives placed values their `arrays` by lane, and yields each section's exchange by lane."""
        kept = self._on_ranks(self._program.outputs)
        for section in self._lanes.sections:
            movable: list[set[str]] = []
            for lane, segment in enumerate(section.segments):
                made = [name for name in (segment.outputs if segment is not None else ()) if name in self._placed]
                arrays[lane].update({name: allocate(lane, name) for name in made})
                movable.append({n for n in made if n not in kept and self._lifetimes[n].readers == 0})
            known = [exchange for exchange in section.exchanges if exchange.out in self._placed]
            exchanger = Exchanger(arrays=arrays, allocate=allocate, movable=movable)
            yield exchanger.make(known) if section.exchanges else None

    def _bound_section(self, lane: int, index: int, exchanges: list[LaneExchange] | None) -> _BoundSection:
        section, session, binding = (
            self._lanes.sections[index],
            self._sessions[index][lane],
            self._bindings[index][lane],
        )
        segment = section.segments[lane]
        outputs = segment.outputs if segment is not None else ()
        return _BoundSection(
            run=session.run_binding if session is not None else None,
            binding=binding,
            collect=tuple((i, name) for i, name in enumerate(outputs) if name in self._unbound),
            exchange=exchanges[lane] if exchanges is not None else None,
            allocated=tuple(exchange for exchange in section.exchanges if exchange.out in self._unbound),
        )

    def _grow(self, name: str) -> None:
        """Gives a growing value an array of its present shape, in memory that is replaced only if it is too small."""
        kind = self._lanes.types[name]
        shape = shape_of(kind.shape or (), self._sizes)
        nbytes = array_nbytes(kind.dtype, shape)
        for lane in self._lifetimes[name].lanes.intersection(self._own):
            block = self._growing_blocks.get((lane, name))
            if block is None or block.nbytes < nbytes:
                block = self._growing_blocks[lane, name] = Block(nbytes + nbytes // 2)
            self._bind_output(lane, name, wrap(block.array(kind.dtype, shape), kind.dtype))
