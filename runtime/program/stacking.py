"""Stacks: what the ranks of a lane compute by the same node on shards of their own, as one node over all of them.

A value of which every rank has a part of its own is one tensor, the parts one behind another along a dimension. A
product of one operand with the ranks' shards of a weight becomes a product with all of their columns, and what follows
from it (sums, activations, attention over more heads) works on the stack, up to a node that needs the parts: there the
stack is split. Only rewrites are made that leave every bit of every rank's part as it is;
`stack_rules.py` has them by op.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from onnx import ModelProto, NodeProto, TensorProto, TensorShapeProto, helper, numpy_helper

from furiosa_llm.runtime.artifact.dimensions import Shape
from furiosa_llm.runtime.artifact.graphs import used_names
from furiosa_llm.runtime.artifact.layout import Mesh
from furiosa_llm.runtime.artifact.manifest import State

_OPSET = 13
"""The first opset in which Split takes its sizes from an operand; programs of an earlier one are not stacked."""

HEADS = 1
"""The dimension of a state of four that runs over the heads of attention."""

Wanted = tuple[tuple[int, tuple[int, ...] | None], ...]
"""The pieces in which a reader takes a rank's part: the size, and the mesh axes along which it differs; None: all."""


class Piece(NamedTuple):
    """A piece of each rank's part of a stack: its size, and how many ranks own one, which their neighbours share."""

    size: int
    owners: int


Pieces = tuple[Piece, ...]
"""What the ranks' parts of a stack are in: the first pieces of all ranks, then the second ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shards:
    """A stored tensor as `rank` has it; of `count` ranks from it on, one behind another in the first dimension."""

    name: str
    rank: int
    count: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """A value of all ranks of a lane as one tensor: their parts along the dimension `axis`, counted from the end."""

    name: str
    axis: int
    pieces: Pieces

    @property
    def size(self) -> int:
        """What one rank has of the dimension."""
        return sum(piece.size for piece in self.pieces)


class ProgramFacts:
    """What stacking has to know of a program: its constants, and which states may be stacked."""

    def __init__(
        self, model: ModelProto, mesh: Mesh, shard_axes: Mapping[str, tuple[int, ...]], states: Collection[State]
    ) -> None:
        graph = model.graph
        self.mesh = mesh
        self.shard_axes = shard_axes
        self.tensors: dict[str, TensorProto] = {tensor.name: tensor for tensor in graph.initializer}
        readers = Counter(name for node in graph.node for name in used_names(node))
        shapes = {value.name: value.type.tensor_type.shape.dim for value in graph.input}
        self._heads: dict[str, int] = {
            state.input: shapes[state.input][3].dim_value
            for state in states
            if (readers[state.input], readers[state.output]) == (1, 0) and _has_heads(shapes[state.input])
        }
        self.states = {state.input: state.output for state in states if state.input in self._heads}
        """Input -> output of the states that may be stacked, along `HEADS`."""
        opsets = {entry.domain: entry.version for entry in model.opset_import}
        self.stacks = max(opsets.get("", 0), opsets.get("ai.onnx", 0)) >= _OPSET
        self._joined = {
            node.output[0]: node
            for node in graph.node
            if node.op_type == "Concat" and all(name in self.tensors for name in node.input)
        }

    def head_size(self, state: str) -> int:
        """How many numbers a head has at each position of one of `states`."""
        return self._heads[state]

    def parts(self, name: str) -> tuple[int, tuple[str, ...]] | None:
        """The dimension in which a constant is put together, and of what stored tensors; None if it is no such."""
        if name in self.tensors:
            return 0, (name,)
        node = self._joined.get(name)
        if node is None:
            return None
        axis = int(node.attribute[0].i)
        return axis % len(self.tensors[node.input[0]].dims), tuple(node.input)

    def dims(self, name: str) -> tuple[int, ...] | None:
        """The shape that each rank has of a constant; None if `name` is none, or is computed."""
        found = self.parts(name)
        if found is None:
            return None
        axis, parts = found
        shape = list(self.tensors[parts[0]].dims)
        if len(parts) > 1:
            shape[axis] = sum(self.tensors[part].dims[axis] for part in parts)
        return tuple(shape)

    def dtype(self, name: str) -> str | None:
        """ONNX's name of a constant's type; None if `name` is none, or is computed."""
        found = self.parts(name)
        return None if found is None else TensorProto.DataType.Name(self.tensors[found[1][0]].data_type)

    def integers(self, name: str) -> tuple[int, ...] | None:
        """The elements of a small constant that is the same on all ranks, and lies in the program itself."""
        tensor = self.tensors.get(name)
        if tensor is None or tensor.data_location == TensorProto.EXTERNAL or self.shard_axes.get(name):
            return None
        return tuple(int(value) for value in numpy_helper.to_array(tensor).reshape(-1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Stacked:
    """A node over all of a lane's ranks, and the stack that it makes of the value `name`."""

    node: NodeProto
    name: str
    stack: Stack


class LaneStacks:
    """The stacks of one segment on one lane.

    `name` gives the lane's name of a rank's value, which is the same for ranks on which the value is alike. `leaving`
    are the program's values that others read: they are not stacked, for the ranks' parts go different ways.
    """

    def __init__(
        self,
        facts: ProgramFacts,
        ranks: Sequence[int],
        name: Callable[[int, str], str],
        *,
        leaving: Collection[str],
        wanted: Mapping[str, Wanted],
    ) -> None:
        self.facts = facts
        self.ranks = tuple(ranks)
        self.leaving = frozenset(leaving)
        self.windows: dict[str, Shards] = {}
        """The initializers of several ranks that have been made, by the lane's names."""
        self.states: dict[str, tuple[int, ...]] = {}
        """The inputs and outputs of the states that have been stacked -> the ranks whose heads they have."""
        self._name = name
        self._wanted = wanted
        self._stacks: dict[str, Stack] = {}
        self._constants: dict[tuple[str, int, Pieces], str | None] = {}
        self._split: set[str] = set()
        self._nodes: list[NodeProto] = []

    # -- what rules ask ----------------------------------------------------------------------------------------

    def stack(self, name: str) -> Stack | None:
        """The stack of a value, if it is one."""
        return self._stacks.get(name)

    def shared(self, name: str) -> str | None:
        """The lane's name of a value that is the same on all of its ranks; None if it is not."""
        names = {self._name(rank, name) for rank in self.ranks}
        return names.pop() if len(names) == 1 and name not in self._stacks else None

    def count(self, name: str) -> int:
        """How many values the ranks have by this name, each the same on as many neighbours; 0 if they lie otherwise."""
        return _runs([self._name(rank, name) for rank in self.ranks])

    def holders(self, count: int) -> tuple[int, ...]:
        """The first ranks of so many equal runs of neighbours."""
        return self.ranks[:: len(self.ranks) // count]

    def pieces(self, name: str, size: int) -> Pieces:
        """The pieces in which whoever reads `name` wants each rank's part, of this `size`."""
        wanted = self._wanted.get(name, ())
        if sum(each for each, _ in wanted) != size:
            return (Piece(size, self.count(name)),)
        everywhere = tuple(range(len(self.facts.mesh.shape)))
        return tuple(Piece(each, self._count_over(everywhere if axes is None else axes)) for each, axes in wanted)

    def own_name(self, name: str) -> str:
        """The lane's name for the stack of the program's value `name`."""
        return stack_name(self.ranks, name)

    def constant(self, name: str, axis: int, pieces: Pieces) -> str | None:
        """The lane's name of the stack of a constant along `axis`, counted from the end; None if it cannot be made."""
        key = (name, axis, pieces)
        if key not in self._constants:
            self._constants[key] = self._stacked_constant(name, axis, pieces)
        return self._constants[key]

    def integers(self, values: Sequence[int]) -> str:
        """The lane's name of a list of integers."""
        name = f"integers/{','.join(map(str, values))}"
        if name not in self._split:
            self._split.add(name)
            self._nodes.append(helper.make_node("Constant", [], [name], value_ints=list(values)))
        return name

    # -- the lane's nodes --------------------------------------------------------------------------------------

    def take(self, stacked: Stacked | None) -> bool:
        """Takes a node of all ranks; whether there is one."""
        if stacked is not None:
            self._stacks[stacked.name] = stacked.stack
            self._nodes.append(stacked.node)
        return stacked is not None

    def split(self, names: Iterable[str]) -> None:
        """Has the ranks' own parts of those of the values `names` that are stacks."""
        for name in names:
            stack = self._stacks.get(name)
            if stack is None or name in self._split:
                continue
            self._split.add(name)
            if len(stack.pieces) == 1:
                [(size, count)] = stack.pieces
                own = [self._name(rank, name) for rank in self.holders(count)]
                self._split_into(stack.name, stack.axis, [size] * count, own)
                continue
            chunks = [
                {rank: f"{self._name(rank, name)}/{index}" for rank in self.holders(piece.owners)}
                for index, piece in enumerate(stack.pieces)
            ]
            sizes = [piece.size for piece in stack.pieces for _ in range(piece.owners)]
            self._split_into(stack.name, stack.axis, sizes, list(itertools.chain(*(each.values() for each in chunks))))
            for rank in self.ranks:
                parts = [each[self._holder(rank, len(each))] for each in chunks]
                self._nodes.append(helper.make_node("Concat", parts, [self._name(rank, name)], axis=stack.axis))

    def taken(self) -> Iterator[NodeProto]:
        """The nodes that were made since the last call."""
        nodes, self._nodes = self._nodes, []
        yield from nodes

    def _split_into(self, name: str, axis: int, sizes: Sequence[int], made: Sequence[str]) -> None:
        operands = [name, self.integers(sizes)]
        self._nodes.append(helper.make_node("Split", operands, list(made), axis=axis))

    def _stacked_constant(self, name: str, axis: int, pieces: Pieces) -> str | None:
        dims, found = self.facts.dims(name), self.facts.parts(name)
        if dims is None or found is None or len(dims) < -axis or dims[axis] != sum(piece.size for piece in pieces):
            return None
        place, (joined, parts) = len(dims) + axis, found
        if len(parts) > 1 and joined != place:
            return None
        made = f"{self.own_name(name)}/{axis}/{','.join(f'{size}x{count}' for size, count in pieces)}"
        cuts, covers = _cover(
            [self.facts.tensors[part].dims[place] for part in parts], [piece.size for piece in pieces]
        )
        held = [(cover, piece.owners) for cover, piece in zip(covers, pieces, strict=True)]
        if not all(self._are_held(parts[at], count) for cover, count in held for at, _ in cover):
            return None
        if len(parts) == len(pieces) == 1 and not place and self._consecutive(name, self.holders(pieces[0].owners)):
            self.windows[made] = Shards(name=name, rank=self.ranks[0], count=pieces[0].owners)
            return made
        chunks = [
            self._chunk(parts[at], rank, axis, cuts[at], order)
            for cover, count in held
            for rank in self.holders(count)
            for at, order in cover
        ]
        self._nodes.append(helper.make_node("Concat", chunks, [made], axis=place))
        return made

    def _are_held(self, name: str, count: int) -> bool:
        """Whether the ranks of each of `count` runs have the same of a stored tensor."""
        return all(self._name(rank, name) == self._name(self._holder(rank, count), name) for rank in self.ranks)

    def _holder(self, rank: int, count: int) -> int:
        """The first rank of the run that `rank` is in, of so many."""
        index = self.ranks.index(rank)
        return self.ranks[index - index % (len(self.ranks) // count)]

    def _chunk(self, part: str, rank: int, axis: int, sizes: Sequence[int], order: int) -> str:
        """The lane's name of the chunk number `order` of a stored tensor that is cut into chunks of `sizes`."""
        own = self._name(rank, part)
        if len(sizes) == 1:
            return own
        made = [f"{own}/{axis}/{index}/{','.join(map(str, sizes))}" for index in range(len(sizes))]
        if made[0] not in self._split:
            self._split.add(made[0])
            self._split_into(own, axis, sizes, made)
        return made[order]

    def _consecutive(self, name: str, ranks: Sequence[int]) -> bool:
        """Whether the shards that `ranks` have of a stored tensor lie one behind another in its file."""
        axes = self.facts.shard_axes.get(name, ())
        first = self.facts.mesh.position(ranks[0], axes)
        return [self.facts.mesh.position(rank, axes) - first for rank in ranks] == list(range(len(ranks)))

    def _count_over(self, axes: Sequence[int]) -> int:
        """How many pieces the ranks have of what differs along mesh `axes`; all their own if they lie otherwise."""
        return _runs([self.facts.mesh.position(rank, axes) for rank in self.ranks]) or len(self.ranks)


def stack_name(ranks: Sequence[int], name: str) -> str:
    """A lane's name for the stack of the program's value `name`."""
    return f"{ranks[0]}-{ranks[-1]}/{name}"


def with_heads_of(shape: Shape, count: int) -> Shape:
    """The shape of a state of so many ranks, whose heads are one behind another, from one rank's shape."""
    return shape if count == 1 else (*shape[:HEADS], int(shape[HEADS]) * count, *shape[HEADS + 1 :])


def _runs(values: Sequence[object]) -> int:
    """How many runs of equal values there are; 0 if they are not of one length, or if a value comes again."""
    runs = [len(list(run)) for _, run in itertools.groupby(values)]
    return len(runs) if len(set(runs)) == 1 and len(set(values)) == len(runs) else 0


def _has_heads(dims: Sequence[TensorShapeProto.Dimension]) -> bool:
    """Whether a state is of `[batch, heads, positions, head size]`."""
    return len(dims) == 4 and dims[HEADS].dim_value > 0 and dims[3].dim_value > 0


def _cover(parts: Sequence[int], pieces: Sequence[int]) -> tuple[list[list[int]], list[list[tuple[int, int]]]]:
    """How parts of these sizes are cut into chunks; for each piece its chunks: a part, and which of its chunks."""
    edges = sorted({0, *itertools.accumulate(parts), *itertools.accumulate(pieces)})
    ends = list(itertools.accumulate(parts))
    cuts: list[list[int]] = [[] for _ in parts]
    places: list[tuple[int, int]] = []
    for start, stop in itertools.pairwise(edges):
        at = next(index for index, end in enumerate(ends) if start < end)
        places.append((at, len(cuts[at])))
        cuts[at].append(stop - start)
    covers: list[list[tuple[int, int]]] = []
    for stop in itertools.accumulate(pieces):
        first = sum(map(len, covers))
        covers.append(places[first : edges.index(stop)])
    return cuts, covers
