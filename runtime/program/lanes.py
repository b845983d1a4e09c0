"""Lanes: the ranks that one thread steps, side by side in one graph, so that a segment of all of them is one call.

The graph has each rank's nodes as the program has them. What several ranks would compute from the same operands is
there once: norms, masks and rotary tables are alike on all ranks. The partial sums of a lane's ranks are added in its
graph, neighbours first, so that a sum has the same order, and the same bits, for any number of lanes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from onnx import NodeProto, TensorProto, helper

from furiosa_llm.runtime.artifact.graphs import COLLECTIVE_DOMAIN, renamed, used_names
from furiosa_llm.runtime.artifact.layout import Mesh, axes_of
from furiosa_llm.runtime.artifact.manifest import Manifest, State
from furiosa_llm.runtime.program.idle_ranks import OnRanks, zero_parts
from furiosa_llm.runtime.program.segments import CollectiveCall, Program, Section, Segment, ValueType
from furiosa_llm.runtime.program.stack_rules import stacked, wanted_pieces
from furiosa_llm.runtime.program.stacking import LaneStacks, ProgramFacts, Shards, stack_name, with_heads_of

_NARROW = frozenset({"FLOAT16", "BFLOAT16"})
"""Types whose partial sums are added in 32 bits and rounded once."""
_ADDED_IN_GRAPH = frozenset({"FLOAT", "DOUBLE", "INT32", "INT64", *_NARROW})
"""Types that onnxruntime's Add has a kernel for, here or after a Cast to FLOAT."""

Alike = Mapping[tuple[int, str], int]
"""(rank, value) -> the first rank on which the value is the same; absent values differ from all other ranks'."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A value of one lane, by the lane's name for it."""

    lane: int
    name: str


Sum = Part | tuple["Sum", "Sum"]
"""The order in which parts are added: first the two sums of a pair, then the pair."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """A collective over one group of ranks, between lanes."""

    call: CollectiveCall
    total: Sum | None
    """What an AllReduce adds up; None for an AllGather."""
    parts: tuple[Part, ...]
    """What an AllGather puts together, in the order of the group."""
    out: str
    """The result's name, the same in each of `lanes`."""
    lanes: tuple[int, ...]
    """The lanes that read the result."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneSegment:
    """A segment of one lane: nodes, inputs and outputs under the lane's names."""

    nodes: tuple[NodeProto, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    initializers: Mapping[str, Shards]
    """The lane's name of an initializer -> what it is in the program, and a rank, or ranks, that have it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneSection:
    """The segment of every lane (None: nothing to compute), then the exchanges."""

    segments: tuple[LaneSegment | None, ...]
    exchanges: tuple[Exchange, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lanes:
    """A program on all lanes of a mesh."""

    program: Program
    mesh: Mesh
    ranks: tuple[tuple[int, ...], ...]
    sections: tuple[LaneSection, ...]
    types: Mapping[str, ValueType]
    """The types of the values that cross sections, by the lanes' names."""
    alike: Alike
    stacked: Mapping[tuple[int, str], tuple[int, ...]]
    """(rank, state) -> the ranks whose states of this name are one tensor, along `HEADS`: the rank or one alike.

    No ranks: nobody reads what the rank would keep.
    """

    def name(self, rank: int, value: str) -> str:
        """The name of the program's `value` of `rank` in the rank's lane."""
        return _named(self.alike, self.stacked, rank, value)

    def lane_of(self, rank: int) -> int:
        """The lane of `rank`."""
        return rank * len(self.ranks) // self.mesh.size


def lanes_of(
    program: Program,
    mesh: Mesh,
    count: int,
    *,
    shard_axes: Mapping[str, tuple[int, ...]],
    inputs: Alike,
    states: Collection[State] | None = None,
    padded: OnRanks = frozenset(),
) -> Lanes:
    """`program` on `count` lanes, contiguous runs of ranks as equal as can be.

    `shard_axes` are the mesh axes along which the shards of a stored initializer, or a state, differ. `inputs` says on
    which ranks graph inputs are alike. The ranks of a lane are stacked where that is possible, the `states` among what
    is, and what would be zero because of shards that are `padded` is left out; without `states` every rank has nodes of
    its own.
    """
    ranks = tuple(ranks_of(lane, mesh.size, count) for lane in range(count))
    facts = None if states is None else ProgramFacts(program.model, mesh, shard_axes, states)
    alike = find_alike(program, mesh, shard_axes, inputs)
    if facts is None or not facts.stacks:
        return _Laying(program, mesh, ranks, alike, None, frozenset()).run()
    return _Laying(program, mesh, ranks, alike, facts, zero_parts(program, mesh, padded)).run()


def shard_axes(manifest: Manifest) -> dict[str, tuple[int, ...]]:
    """The mesh axes along which the shards of each stored tensor, and of each state, differ."""
    states = {
        info.name: tuple(dict.fromkeys(axis for layout in info.layout if layout for axis in axes_of(layout)))
        for info in manifest.inputs
        if info.role == "state"
    }
    return states | {tensor.name: tensor.shard_axes for tensor in manifest.tensors}


def alike_inputs(manifest: Manifest) -> Alike:
    """On which ranks the graph inputs are alike: on all if an input is not split; each rank has its own states."""
    return {
        (rank, info.name): 0
        for info in manifest.inputs
        if info.role != "state" and not any(layout is not None and axes_of(layout) for layout in info.layout)
        for rank in range(manifest.mesh.size)
    }


def ranks_of(lane: int, ranks: int, lanes: int) -> tuple[int, ...]:
    """The ranks of `lane`, ascending."""
    return tuple(rank for rank in range(ranks) if rank * lanes // ranks == lane)


def find_alike(program: Program, mesh: Mesh, shard_axes: Mapping[str, tuple[int, ...]], inputs: Alike) -> Alike:
    """On which ranks each value is the same: computed by the same node from the same operands.

    A collective gives all ranks of a group the same. Dequantised weights count as different even where they are the
    same, and so does what they follow from: onnxruntime fuses the dequantisation with the one product that reads it,
    and if several products read it, it does not fuse them, and rounds differently.
    """
    alike = dict(inputs)
    behind = {tensor.name: {tensor.name} for tensor in program.model.graph.initializer}
    fused: set[str] = set()
    firsts: dict[tuple[int, ...], list[int]] = {}  # for each rank the first that has the same shard
    for tensor in program.model.graph.initializer:
        axes = shard_axes.get(tensor.name, ())
        if axes not in firsts:
            positions = [mesh.position(rank, axes) for rank in range(mesh.size)]
            firsts[axes] = [positions.index(position) for position in positions]
        alike.update({(rank, tensor.name): first for rank, first in enumerate(firsts[axes])})
    groups = {
        call.output: mesh.groups(call.collective.axes) for section in program.sections for call in section.collectives
    }
    for node in program.model.graph.node:
        if node.domain == COLLECTIVE_DOMAIN:
            for group in groups[node.output[0]]:
                alike.update({(rank, node.output[0]): group[0] for rank in group})
            continue
        read = tuple(dict.fromkeys(used_names(node)))
        if behind.keys() >= set(read):
            constants = {*node.output}.union(*(behind[name] for name in read))
            behind.update(dict.fromkeys(filter(None, node.output), constants))
            if node.op_type == "DequantizeLinear":
                fused |= constants
        first: dict[tuple[int, ...], int] = {}
        for rank in range(mesh.size):
            owner = first.setdefault(tuple(alike.get((rank, name), rank) for name in read), rank)
            alike.update({(rank, name): owner for name in node.output if name})
    return {(rank, name): owner for (rank, name), owner in alike.items() if name not in fused}


def _named(alike: Alike, stacked: Mapping[tuple[int, str], tuple[int, ...]], rank: int, value: str) -> str:
    ranks = stacked.get((rank, value))
    return stack_name(ranks, value) if ranks else f"{alike.get((rank, value), rank)}/{value}"


class _Laying:
    """Lays a program out on lanes, section by section."""

    def __init__(
        self,
        program: Program,
        mesh: Mesh,
        ranks: tuple[tuple[int, ...], ...],
        alike: Alike,
        facts: ProgramFacts | None,
        zeros: OnRanks,
    ) -> None:
        self._program = program
        self._mesh = mesh
        self._ranks = ranks
        self._alike = alike
        self._lane_of = {rank: lane for lane, own in enumerate(ranks) for rank in own}
        self._read = {name for section in program.sections if section.segment for name in section.segment.inputs}
        self._facts = facts
        self._zeros = {(rank, name) for rank, name in zeros if name not in self._read.union(program.outputs)}
        self._stacked: dict[tuple[int, str], tuple[int, ...]] = {}
        self._types = {
            self._name(rank, name): kind for name, kind in program.types.items() for rank in range(mesh.size)
        }

    def run(self) -> Lanes:
        """See `lanes_of`."""
        sections = tuple(self._section(section) for section in self._program.sections)
        return Lanes(
            program=self._program,
            mesh=self._mesh,
            ranks=self._ranks,
            sections=sections,
            types=self._types,
            alike=self._alike,
            stacked=self._stacked,
        )

    def _name(self, rank: int, value: str) -> str:
        return _named(self._alike, self._stacked, rank, value)

    def _section(self, section: Section) -> LaneSection:
        sums: list[list[NodeProto]] = [[] for _ in self._ranks]
        exchanges = tuple(
            self._exchange(call, group, sums)
            for call in section.collectives
            for group in self._mesh.groups(call.collective.axes)
        )
        parts = [{p.name for e in exchanges for p in parts_of(e) if p.lane == lane} for lane in range(len(self._ranks))]
        segments = tuple(
            self._segment(section.segment, ranks, sums[lane], parts[lane]) for lane, ranks in enumerate(self._ranks)
        )
        return LaneSection(segments=segments, exchanges=exchanges)

    # -- collectives -------------------------------------------------------------------------------------------

    def _exchange(self, call: CollectiveCall, group: Sequence[int], sums: Sequence[list[NodeProto]]) -> Exchange:
        lanes = tuple(dict.fromkeys(self._lane_of[rank] for rank in group))
        out = self._name(group[0], call.output)
        if call.collective.kind == "AllReduce":
            return Exchange(call=call, total=self._sum(call, group, sums), parts=(), out=out, lanes=lanes)
        parts = tuple(Part(lane=self._lane_of[rank], name=self._name(rank, call.input)) for rank in group)
        return Exchange(call=call, total=None, parts=parts, out=out, lanes=lanes)

    def _sum(self, call: CollectiveCall, group: Sequence[int], sums: Sequence[list[NodeProto]]) -> Sum:
        """The sum over `group`: the parts that lie in one lane are added in the lane's graph."""
        lane, dtype = self._lane_of[group[0]], self._program.types[call.input].dtype
        whole = all(self._lane_of[rank] == lane for rank in group)
        if len(group) == 1 or (whole and dtype in _ADDED_IN_GRAPH):
            return Part(lane=lane, name=self._added(call, group, sums[lane]))
        halves = [self._sum(call, half, sums) for half in self._halves(call, group)]
        return halves[0] if len(halves) == 1 else (halves[0], halves[1])

    def _added(self, call: CollectiveCall, group: Sequence[int], nodes: list[NodeProto]) -> str:
        """Appends to `nodes` the nodes that add the parts of `group`, and returns the name of their sum."""
        kind = self._program.types[call.input]
        if len(group) > 1:
            operands = [self._added(call, half, nodes) for half in self._halves(call, group)]
            if len(operands) == 1:
                return operands[0]
            name = f"sum/{group[0]}-{group[-1]}/{call.output}"
            nodes.append(helper.make_node("Add", operands, [name]))
        elif kind.dtype in _NARROW:
            part = self._name(group[0], call.input)
            name = f"wide/{group[0]}/{call.output}"
            nodes.append(helper.make_node("Cast", [part], [name], to=TensorProto.FLOAT))
        else:
            return self._name(group[0], call.input)
        self._types[name] = ValueType(dtype="FLOAT" if kind.dtype in _NARROW else kind.dtype, shape=kind.shape)
        return name

    def _halves(self, call: CollectiveCall, group: Sequence[int]) -> list[Sequence[int]]:
        """What `group` is added up from, without a half that is all zeros: x + 0 is x, but for the sign of a zero."""
        halves = (_first(group), _rest(group))
        return [half for half in halves if any((rank, call.input) not in self._zeros for rank in half)]

    # -- segments ----------------------------------------------------------------------------------------------

    def _segment(
        self, segment: Segment | None, ranks: Sequence[int], sums: Sequence[NodeProto], parts: Collection[str]
    ) -> LaneSegment | None:
        """The segment of one lane; its outputs are what later segments, the caller and the exchanges read."""
        leaving = set(parts)
        nodes: list[NodeProto] = []
        initializers: dict[str, Shards] = {}
        if segment is not None:
            wanted = [name for name in segment.outputs if name in self._read or name in self._program.outputs]
            nodes = list(self._nodes(segment, ranks, initializers))
            leaving.update(
                self._name(rank, name) for name in wanted for rank in ranks if self._stacked.get((rank, name)) != ()
            )
        return lane_segment([*nodes, *sums], leaving, initializers)

    def _nodes(self, segment: Segment, ranks: Sequence[int], initializers: dict[str, Shards]) -> Iterator[NodeProto]:
        """The nodes of the ranks, without nodes that would compute the same as another rank's node.

        What they read of stored tensors is added to `initializers`.
        """
        nodes = [self._program.model.graph.node[position] for position in segment.nodes]
        stacks = self._stacks(segment, nodes, self._busy(segment, ranks))
        for node in nodes:
            made = next(name for name in node.output if name)
            owners = {self._alike.get((rank, made), rank): rank for rank in reversed(ranks)}
            if stacks is not None:
                whole = stacks.count(made) > 1 and stacks.take(stacked(node, stacks))
                if not whole:
                    stacks.split(used_names(node))
                yield from stacks.taken()
                if whole:
                    continue
            yield from (self._renamed(node, rank) for rank in sorted(owners.values()))
        for name in segment.initializers:
            initializers.update({self._name(rank, name): Shards(name=name, rank=rank) for rank in reversed(ranks)})
        if stacks is not None:
            initializers.update(stacks.windows)
            self._stack_states(stacks)

    def _busy(self, segment: Segment, ranks: Sequence[int]) -> list[int]:
        """Those of `ranks` of which somebody reads what they alone compute; the others keep no states in `segment`."""
        if not self._zeros or self._facts is None:
            return list(ranks)
        states = {out: name for name, out in self._facts.states.items() if out in segment.outputs}
        zeros = {rank for rank, name in self._zeros if name in segment.outputs}
        known = {self._name(r, name) for name in segment.outputs for r in range(self._mesh.size) if r not in zeros}
        idle = [
            rank
            for rank in zeros
            if all(n in states or (rank, n) in self._zeros or self._name(rank, n) in known for n in segment.outputs)
        ]
        self._stacked.update({(rank, name): () for rank in idle for state in states.items() for name in state})
        return [rank for rank in ranks if rank not in idle]

    def _stacks(self, segment: Segment, nodes: Sequence[NodeProto], ranks: Sequence[int]) -> LaneStacks | None:
        """What stacks the nodes of `ranks`; None if they are to have nodes of their own."""
        if self._facts is None or len(ranks) < 2:
            return None
        leaving = set(segment.outputs).difference(self._facts.states.values())
        return LaneStacks(self._facts, ranks, self._name, leaving=leaving, wanted=wanted_pieces(nodes, self._facts))

    def _stack_states(self, stacks: LaneStacks) -> None:
        """Takes note of the states that have been stacked: they are bound as one."""
        for name, holders in stacks.states.items():
            self._stacked.update({(rank, name): holders for rank in stacks.ranks})
            kind = self._program.types[name]
            shape = with_heads_of(kind.shape or (), len(holders))
            self._types[stack_name(holders, name)] = ValueType(dtype=kind.dtype, shape=shape)

    def _renamed(self, node: NodeProto, rank: int) -> NodeProto:
        names = {name: self._name(rank, name) for name in (*used_names(node), *node.output) if name}
        return renamed(node, names, str(rank))


def parts_of(exchange: Exchange) -> tuple[Part, ...]:
    """The values that go into `exchange`."""
    return exchange.parts if exchange.total is None else tuple(_leaves(exchange.total))


def lane_segment(
    nodes: Sequence[NodeProto], leaving: Collection[str], initializers: Mapping[str, Shards]
) -> LaneSegment | None:
    """A segment of those of `nodes` that the values `leaving` follow from, which are its outputs; None: of none."""
    needed = _needed(nodes, leaving)
    if not needed:
        return None
    made = dict.fromkeys(name for node in needed for name in node.output if name)
    read = dict.fromkeys(name for node in needed for name in used_names(node))
    return LaneSegment(
        nodes=tuple(needed),
        inputs=tuple(name for name in read if name not in made and name not in initializers),
        outputs=tuple(name for name in made if name in leaving),
        initializers={name: shards for name, shards in initializers.items() if name in read},
    )


def _needed(nodes: Sequence[NodeProto], leaving: Collection[str]) -> list[NodeProto]:
    """The nodes that the values `leaving` follow from."""
    wanted, found = set(leaving), []
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            found.append(node)
            wanted.update(used_names(node))
    return found[::-1]


def _leaves(total: Sum) -> Iterator[Part]:
    if isinstance(total, Part):
        yield total
    else:
        for side in total:
            yield from _leaves(side)


def _first(group: Sequence[int]) -> Sequence[int]:
    """The first ranks of `group`, as many as the greatest power of two below its size: these are added first."""
    return group[: 1 << ((len(group) - 1).bit_length() - 1)]


def _rest(group: Sequence[int]) -> Sequence[int]:
    return group[len(_first(group)) :]
