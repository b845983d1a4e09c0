"""A program bound to memory: every input and output of every segment on every rank has its place before a run starts.

A run then is a fixed list of `run_with_iobinding` calls, numpy operations and barriers for each driver thread. Changing
a dynamic size rebinds what depends on it and nothing else. A value whose shape the program does not tell is allocated
by onnxruntime in each run and passed on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from furiosa_llm.runtime.artifact.dimensions import parse_dimension, shape_of
from furiosa_llm.runtime.artifact.layout import Mesh
from furiosa_llm.runtime.collectives import gather_operations, reduce_operations, run_operations
from furiosa_llm.runtime.driver import Barrier, Drivers, ranks_of
from furiosa_llm.runtime.errors import ExecutionError
from furiosa_llm.runtime.exchange import Exchanger, ThreadExchange
from furiosa_llm.runtime.memory import Block, array_nbytes, lifetimes, place
from furiosa_llm.runtime.ort import ORT_ERRORS, Array, RawBinding, RawTensor, Tensor, let_allocate, unwrap, wrap
from furiosa_llm.runtime.program import CollectiveCall, Program, growing_values
from furiosa_llm.runtime.sessions import RankSessions

Bind = Callable[[str, RawTensor], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """One segment on one rank. `collect` are the outputs, by position, that onnxruntime allocates in each run."""

    rank: int
    run: Callable[[RawBinding, None], None]
    binding: RawBinding
    collect: tuple[tuple[int, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _ThreadStep:
    """What one thread does in one step. `exchange` is None if nothing is exchanged behind the segment.

    `allocated` are collectives whose shapes are known only when the segments have run.
    """

    runs: tuple[_Run, ...]
    exchange: ThreadExchange | None
    allocated: tuple[CollectiveCall, ...]


class BoundProgram:
    """The bindings and the memory of one user of a program; several may share the sessions, one runs at a time.

    The caller binds the graph inputs and the outputs named `external`, calls `resize` with the dynamic sizes and then
    `run`; `array` gives any other output. Outputs named `unbound` are allocated by onnxruntime whatever their shape.
    Values whose shape depends on the dimensions `growing` have memory of their own, so that these may change in each
    run at little cost.
    """

    def __init__(
        self,
        program: Program,
        mesh: Mesh,
        sessions: Sequence[RankSessions | None],
        drivers: Drivers,
        *,
        external: frozenset[str] = frozenset(),
        unbound: frozenset[str] = frozenset(),
        growing: frozenset[str] = frozenset(),
    ) -> None:
        self._program = program
        self._mesh = mesh
        self._drivers = drivers
        self._external = external
        self._sessions = sessions
        self._growing_names = growing
        self._lifetimes = lifetimes(program)
        self._growing = growing_values(program, growing).intersection(self._lifetimes) - external - unbound
        self._unbound = self._shapeless(unbound)
        self._exchanger = Exchanger(mesh=mesh, threads=drivers.count)
        self._sizes: dict[str, int] = {}
        self._tensors: list[dict[str, Tensor]] = [{} for _ in range(mesh.size)]
        self._inputs_of: list[dict[str, list[Bind]]] = [{} for _ in range(mesh.size)]
        self._outputs_of: list[dict[str, RawBinding]] = [{} for _ in range(mesh.size)]
        self._bindings = [self._bind_step(index) for index in range(len(program.steps))]
        self._blocks: list[Block] = []
        self._growing_blocks: dict[tuple[int, str], Block] = {}
        self._steps: list[list[_ThreadStep]] = []

    def bind_shared(self, name: str, array: Array) -> None:
        """Binds the graph input `name` to `array` on every rank; the array may be written between runs."""
        tensor = wrap(array, self._program.types[name].dtype)
        for rank in range(self._mesh.size):
            self.bind_input(rank, name, tensor)

    def bind_input(self, rank: int, name: str, tensor: Tensor) -> None:
        """Binds the graph input `name` of `rank` to `tensor`, which has the rank's local shape."""
        self._tensors[rank][name] = tensor
        for bind in self._inputs_of[rank].get(name, ()):
            bind(name, tensor.raw)

    def bind_output(self, rank: int, name: str, tensor: Tensor) -> None:
        """Binds the output `name` of `rank`, and whatever reads it, to `tensor`, which has the rank's local shape."""
        self.bind_input(rank, name, tensor)
        binding = self._outputs_of[rank].get(name)
        if binding is not None:
            binding.bind_ortvalue_output(name, tensor.raw)

    def array(self, rank: int, name: str) -> Array:
        """The output `name` of `rank`: memory that the next run may overwrite."""
        return self._tensors[rank][name].array

    def resize(self, sizes: Mapping[str, int]) -> None:
        """Gives every value its place for the dynamic `sizes`."""
        changed = {name for name, size in sizes.items() if self._sizes.get(name) != size}
        self._sizes = dict(sizes)
        if not self._steps or not changed <= self._growing_names:
            self._place_all()
            self._steps = self._compile()
            changed = set(sizes)
        for name in self._growing:
            shape = self._program.types[name].shape or ()
            if any(changed.intersection(parse_dimension(dim).names) for dim in shape if isinstance(dim, str)):
                self._grow(name)

    def run(self) -> None:
        """Runs the program once; raises ExecutionError, naming segment and rank, if onnxruntime fails."""
        self._drivers.run(self._drive)

    def _drive(self, thread: int, barrier: Barrier) -> None:
        for index, step in enumerate(self._steps[thread]):
            self._run_segment(index, step)
            exchange = step.exchange
            if exchange is None:
                continue
            run_operations(exchange.before)
            barrier.wait(thread)
            run_operations(exchange.after)
            if step.allocated:
                self._exchange_allocated(thread, step.allocated)
            if exchange.late_barrier:
                barrier.wait(thread)

    def _run_segment(self, index: int, step: _ThreadStep) -> None:
        for item in step.runs:
            try:
                item.run(item.binding, None)
            except ORT_ERRORS as error:
                raise ExecutionError(f"segment {index} failed on rank {item.rank}: {error}") from error
            if item.collect:
                self._collect(item)

    def _collect(self, item: _Run) -> None:
        """Passes on the outputs that onnxruntime has allocated, and has it allocate new ones in the next run."""
        outputs = item.binding.get_outputs()
        for position, name in item.collect:
            self.bind_input(item.rank, name, unwrap(outputs[position], self._program.types[name].dtype))
            let_allocate(item.binding, name)

    def _exchange_allocated(self, thread: int, calls: Sequence[CollectiveCall]) -> None:
        own = ranks_of(thread, self._mesh.size, self._drivers.count)
        for call in calls:
            for group in self._mesh.groups(call.collective.axes):
                ranks = [rank for rank in group if rank in own]
                if not ranks:
                    continue
                out = _exchanged(call, [self.array(rank, call.input) for rank in group])
                tensor = wrap(out, self._program.types[call.output].dtype)
                for rank in ranks:
                    self.bind_input(rank, call.output, tensor)

    def _bind_step(self, index: int) -> list[RawBinding]:
        """The bindings of a step's segment by rank, with outputs in the order of the segment."""
        row, segment = self._sessions[index], self._program.steps[index].segment
        if row is None or segment is None:
            return []
        bindings = [session.binding() for session in row]
        for rank, binding in enumerate(bindings):
            for name in segment.outputs:
                let_allocate(binding, name)
                self._outputs_of[rank][name] = binding
            for name in segment.inputs:
                self._inputs_of[rank].setdefault(name, []).append(binding.bind_ortvalue_input)
        return bindings

    def _shapeless(self, unbound: frozenset[str]) -> frozenset[str]:
        """The values that a run must allocate: `unbound`, those of unknown shape, and collectives that read such."""
        shapeless = {name for name in self._lifetimes if name in unbound or not self._has_known_shape(name)}
        for step in self._program.steps:
            for call in step.collectives:
                inputs = {*shapeless, *self._program.inputs, *self._growing, *self._external}
                if call.input in inputs or call.output in self._growing:
                    shapeless.add(call.output)
        return frozenset(shapeless)

    def _has_known_shape(self, name: str) -> bool:
        shape = self._program.types[name].shape
        dims = [dim for dim in shape or () if isinstance(dim, str)]
        return shape is not None and all(self._program.sizes.issuperset(parse_dimension(dim).names) for dim in dims)

    def _place_all(self) -> None:
        """Places all values but the growing ones, and binds them."""
        placed: list[tuple[str, int]] = []
        shapes: dict[str, tuple[int, ...]] = {}
        for name in self._lifetimes:
            if name in self._external or name in self._growing or name in self._unbound:
                continue
            kind = self._program.types[name]
            shapes[name] = shape_of(kind.shape or (), self._sizes)
            placed.append((name, array_nbytes(kind.dtype, shapes[name])))
        offsets, nbytes = place((name, size, self._lifetimes[name]) for name, size in placed)
        if not self._blocks or nbytes > self._blocks[0].nbytes:
            self._blocks = [Block(nbytes) for _ in range(self._mesh.size)]

        def allocate(rank: int, name: str) -> Array:
            return self._blocks[rank].array(self._program.types[name].dtype, shapes[name], offsets[name])

        arrays: list[dict[str, Array]] = [{} for _ in range(self._mesh.size)]
        self._exchanges = self._exchange_all(arrays, frozenset(shapes), allocate)
        for rank, named in enumerate(arrays):
            for name, array in named.items():
                self.bind_output(rank, name, wrap(array, self._program.types[name].dtype))

    def _exchange_all(
        self, arrays: list[dict[str, Array]], names: frozenset[str], allocate: Callable[[int, str], Array]
    ) -> list[list[ThreadExchange] | None]:
        """Gives the values `names` their `arrays` by rank, and returns each step's exchange by thread."""
        exchanges: list[list[ThreadExchange] | None] = []
        outputs = set(self._program.outputs)
        for step in self._program.steps:
            made = step.segment.outputs if step.segment is not None else ()
            for name in made:
                if name in names:
                    for rank, named in enumerate(arrays):
                        named[name] = allocate(rank, name)
            known = [call for call in step.collectives if call.output in names]
            movable = frozenset(name for name in made if name not in outputs)
            exchange = self._exchanger.make(known, arrays, allocate, movable)
            exchanges.append(exchange if step.collectives else None)
        return exchanges

    def _compile(self) -> list[list[_ThreadStep]]:
        """Every thread's steps."""
        return [
            [self._thread_step(thread, index) for index in range(len(self._program.steps))]
            for thread in range(self._drivers.count)
        ]

    def _thread_step(self, thread: int, index: int) -> _ThreadStep:
        step, row, exchange = self._program.steps[index], self._sessions[index], self._exchanges[index]
        runs: list[_Run] = []
        if row is not None and step.segment is not None:
            collect = tuple((i, name) for i, name in enumerate(step.segment.outputs) if name in self._unbound)
            for rank in ranks_of(thread, self._mesh.size, self._drivers.count):
                binding = self._bindings[index][rank]
                runs.append(_Run(rank=rank, run=row[rank].run_binding, binding=binding, collect=collect))
        return _ThreadStep(
            runs=tuple(runs),
            exchange=exchange[thread] if exchange is not None else None,
            allocated=tuple(call for call in step.collectives if call.output in self._unbound),
        )

    def _grow(self, name: str) -> None:
        """Gives a growing value an array of its present shape, in memory that is replaced only if it is too small."""
        kind = self._program.types[name]
        shape = shape_of(kind.shape or (), self._sizes)
        nbytes = array_nbytes(kind.dtype, shape)
        for rank in range(self._mesh.size):
            block = self._growing_blocks.get((rank, name))
            if block is None or block.nbytes < nbytes:
                block = self._growing_blocks[rank, name] = Block(nbytes + nbytes // 2)
            self.bind_output(rank, name, wrap(block.array(kind.dtype, shape), kind.dtype))


def _exchanged(call: CollectiveCall, parts: Sequence[Array]) -> Array:
    """The result of a collective on arrays that onnxruntime has allocated."""
    if call.collective.kind == "AllReduce":
        out = np.empty_like(parts[0])
        run_operations(reduce_operations(parts, out))
        return out
    dim = call.collective.dim or 0
    shape = list(parts[0].shape)
    shape[dim] *= len(parts)
    out = np.empty(shape, dtype=parts[0].dtype)
    for position, part in enumerate(parts):
        run_operations(gather_operations(part, position, out, dim))
    return out
