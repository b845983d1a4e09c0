"""Which nodes of a lane's ranks become one node over a stack, by op: those whose results keep every bit.

That a kernel computes each column, head or element by itself, whatever is beside it, is tested by comparing bits on
onnxruntime's kernels for several processors; where it depends on a size, the rule asks for the size.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from onnx import AttributeProto, NodeProto

from furiosa_llm.runtime.artifact.graphs import used_names
from furiosa_llm.runtime.program.stacking import (
    LaneStacks,
    Piece,
    Pieces,
    ProgramFacts,
    Stack,
    Stacked,
    Wanted,
    stack_name,
)

_EXACT = frozenset({"Add", "Sub", "Mul", "Div", "Neg", "Relu"})
"""Computed element by element, by operations that are rounded as IEEE 754 says."""
_APPROXIMATE = frozenset(
    {"Sigmoid", "Tanh", "Erf", "Gelu", "QuickGelu", "FastGelu", "Swish", "HardSigmoid", "Exp", "Sqrt", "Pow"}
)
"""Computed element by element, by kernels that take what is left behind whole vectors another way."""
_ELEMENTWISE = _EXACT | _APPROXIMATE
_VECTOR = 32
"""So many elements, or a part of them, are in a vector."""
_COLUMNS = 16
"""Kernels for 4-bit and 8-bit weights take so many columns together, or fewer, and what is left another way."""
_NARROW, _SUMMANDS = 64, 128
"""A kernel that dequantises first adds so many summands at a time, but more of them for so few columns."""
_MOST_COPIED = 1 << 20
"""Bytes of a lane's float matrix: a larger one is read no faster as one, and is there twice as it is put together.

One with columns that ranks share is less than the ranks' own, and is put together whatever its size.
"""
_PAST, _SHARED_PORTS, _SINK = (3, 4), (5, 6, 7, 8, 9), 11
"""Operands of GroupQueryAttention: states, what all heads read, what each head has of its own."""

Rule = Callable[[NodeProto, LaneStacks], Stacked | None]


def stacked(node: NodeProto, lane: LaneStacks) -> Stacked | None:
    """The node over all of the lane's ranks that `node` becomes; None if they keep nodes of their own."""
    rule = _RULES.get(node.op_type)
    if rule is None or any(name in lane.leaving for name in node.output):
        return None
    return rule(node, lane)


def wanted_pieces(nodes: Sequence[NodeProto], facts: ProgramFacts) -> dict[str, Wanted]:
    """In what pieces the readers of a value want each rank's part, where all of them want the same."""
    wants: dict[str, set[Wanted]] = {}

    def agreed(name: str) -> Wanted:
        found = wants.get(name, set())
        return min(found) if len(found) == 1 else ()

    for node in reversed(nodes):
        passed = agreed(node.output[0]) if node.op_type in _ELEMENTWISE else ()
        for port, name in enumerate(used_names(node)):
            pieces = _packed_pieces(node, facts) if port == 0 else ()
            wants.setdefault(name, set()).add(pieces or passed)
    return {name: pieces for name in wants if (pieces := agreed(name))}


# -- products ------------------------------------------------------------------------------------------------------


def _matmul(node: NodeProto, lane: LaneStacks) -> Stacked | None:
    """The columns of all shards behind one another."""
    given, weight = lane.shared(node.input[0]), node.input[1]
    dims = lane.facts.dims(weight)
    if given is None or dims is None or len(dims) != 2 or lane.facts.dtype(weight) != "FLOAT":
        return None
    pieces = lane.pieces(node.output[0], dims[1])
    alone = all(piece.owners == len(lane.ranks) for piece in pieces)
    if alone and 4 * dims[0] * _total(pieces) > _MOST_COPIED:
        return None
    columns = lane.constant(weight, -1, pieces)
    return None if columns is None else _one(node, lane, [given, columns], -1, pieces)


def _matmul_nbits(node: NodeProto, lane: LaneStacks) -> Stacked | None:
    """The same for weights that are stored by columns; each one's bits, blocks and scales are its own."""
    given, settings, ports = lane.shared(node.input[0]), _integers(node), list(node.input)[1:]
    columns = settings["N"]
    pieces = lane.pieces(node.output[0], columns)
    one_stride = columns > _NARROW or settings["K"] <= _SUMMANDS
    if given is None or any(piece.size % _COLUMNS for piece in pieces) or not one_stride:
        return None
    if lane.facts.dtype(ports[1]) != "FLOAT" or any(ports[3:4]):
        return None
    operands = [given]
    for name in ports:
        dims = lane.facts.dims(name)
        if name and (dims is None or dims[0] % columns):
            return None
        each = dims[0] // columns if name and dims is not None else 0
        wanted = tuple(Piece(size * each, count) for size, count in pieces)
        stack = lane.constant(name, -len(dims or ()), wanted) if name else ""
        if stack is None:
            return None
        operands.append(stack)
    return _one(node, lane, operands, -1, pieces, N=_total(pieces))


# -- element by element --------------------------------------------------------------------------------------------


def _elementwise(node: NodeProto, lane: LaneStacks) -> Stacked | None:
    """On stacks that lie alike, and constants."""
    stacks = [stack for stack in map(lane.stack, node.input) if stack is not None]
    if not stacks or len({(stack.axis, stack.pieces) for stack in stacks}) > 1:
        return None
    like = stacks[0]
    if node.op_type in _APPROXIMATE and (like.axis != -1 or like.size % _VECTOR or _total(like.pieces) % _VECTOR):
        return None
    operands: list[str] = []
    for name in node.input:
        stack = lane.stack(name)
        operand = stack.name if stack is not None else _beside(name, like, lane)
        if operand is None:
            return None
        operands.append(operand)
    return _one(node, lane, operands, like.axis, like.pieces)


def _beside(name: str, like: Stack, lane: LaneStacks) -> str | None:
    """The lane's name of a constant as an operand beside a stack; None if it is another one on each rank."""
    dims = lane.facts.dims(name)
    if dims is None:
        return None
    if len(dims) < -like.axis or dims[like.axis] == 1:
        return lane.shared(name)
    return lane.constant(name, like.axis, like.pieces)


# -- forms ---------------------------------------------------------------------------------------------------------


def _reshape(node: NodeProto, lane: LaneStacks) -> Stacked | None:
    """The last dimension, which is stacked, in several, of which the first one is stacked then.

    The first dimensions are copied, and what the others hold is the size of the last: so there are no more of them.
    """
    stack, shape = lane.stack(node.input[0]), lane.facts.integers(node.input[1])
    if stack is None or not shape or stack.axis != -1 or len(stack.pieces) > 1 or _integers(node).get("allowzero"):
        return None
    inner = tuple(itertools.dropwhile(lambda size: size == 0, shape))
    if len(inner) == len(shape) or len(inner) < 2 or min(inner) < 1 or math.prod(inner) != stack.size:
        return None
    count = stack.pieces[0].owners
    wanted = lane.integers([*shape[: -len(inner)], inner[0] * count, *inner[1:]])
    return _one(node, lane, [stack.name, wanted], -len(inner), (Piece(inner[0], count),))


def _reduce_sum(node: NodeProto, lane: LaneStacks) -> Stacked | None:
    """Over the last dimension, which is not the stacked one."""
    stack, axes = lane.stack(node.input[0]), node.input[1] if len(node.input) > 1 else ""
    shared = lane.shared(axes)
    if stack is None or stack.axis == -1 or lane.facts.integers(axes) != (-1,) or shared is None:
        return None
    kept = _integers(node).get("keepdims", 1)
    return _one(node, lane, [stack.name, shared], stack.axis if kept else stack.axis + 1, stack.pieces)


# -- attention -----------------------------------------------------------------------------------------------------


def _packed_pieces(node: NodeProto, facts: ProgramFacts) -> Wanted:
    """What a rank's part of attention's first operand has of queries, keys and values; empty if it has them apart.

    A key head of its own that several ranks have is wanted once.
    """
    if node.op_type != "GroupQueryAttention" or node.input[1] or node.input[3] not in facts.states:
        return ()
    settings, size = _integers(node), facts.head_size(node.input[3])
    heads = settings["kv_num_heads"]
    keys = (heads * size, facts.shard_axes.get(node.input[3]) if heads == 1 else None)
    return ((settings["num_heads"] * size, None), keys, keys)


def _attention(node: NodeProto, lane: LaneStacks) -> Stacked | None:
    """The heads of all ranks, which have caches of their own, or share those of their neighbours."""
    settings, facts, ports = _integers(node), lane.facts, dict(enumerate(node.input))
    heads, count = settings["num_heads"], len(lane.ranks)
    states = [ports.get(port, "") for port in _PAST]
    if any(name not in facts.states for name in states) or [facts.states[n] for n in states] != list(node.output)[1:3]:
        return None
    if any(ports.get(port) for port in ports if port > max(_SHARED_PORTS) and port != _SINK) or any(node.output[3:]):
        return None
    sizes = [size * facts.head_size(states[0]) for size in (heads, *[settings["kv_num_heads"]] * 2)]
    given = [_stack_or_shared(name, size, lane) for name, size in zip(node.input, sizes, strict=False) if name]
    pieces = [piece for stack in given if stack is not None for piece in stack.pieces]
    if any(stack is None or stack.axis != -1 for stack in given) or [piece.size for piece in pieces] != sizes:
        return None
    shared = pieces[1].owners
    if pieces[0].owners != count or pieces[2].owners != shared or (shared != count and settings["kv_num_heads"] > 1):
        return None
    holders = lane.holders(shared)
    own = [stack_name(holders, name) for name in (*states, *list(node.output)[1:3])]
    operands = [*([stack.name for stack in given if stack is not None] + ["", ""])[:3], *own[:2]]
    for port in sorted(port for port in ports if port > max(_PAST)):
        name = ports[port]
        sink = (Piece(heads, count),)
        found = "" if not name else lane.constant(name, -1, sink) if port == _SINK else lane.shared(name)
        if found is None:
            return None
        operands.append(found)
    kv_heads = settings["kv_num_heads"] * shared
    one = _one(node, lane, operands, -1, (Piece(sizes[0], count),), num_heads=heads * count, kv_num_heads=kv_heads)
    one.node.output[1:3] = own[2:]
    lane.states.update(dict.fromkeys((*states, *list(node.output)[1:3]), holders))
    return one


def _stack_or_shared(name: str, size: int, lane: LaneStacks) -> Stack | None:
    """The stack of a value; of one that is alike on all ranks a stack of a single piece."""
    shared = lane.shared(name)
    return lane.stack(name) if shared is None else Stack(name=shared, axis=-1, pieces=(Piece(size, 1),))


_RULES: Mapping[str, Rule] = {
    "MatMul": _matmul,
    "MatMulNBits": _matmul_nbits,
    "Reshape": _reshape,
    "ReduceSum": _reduce_sum,
    "GroupQueryAttention": _attention,
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
}


def _one(
    node: NodeProto, lane: LaneStacks, operands: Iterable[str], axis: int, pieces: Pieces, **settings: int
) -> Stacked:
    """`node` with other operands and `settings`; its first output is a stack, and the others are states."""
    own = NodeProto()
    own.CopyFrom(node)
    own.name = lane.own_name(node.name) if node.name else ""
    own.input[:] = list(operands)
    own.output[:] = [lane.own_name(name) if name else "" for name in node.output]
    for attribute in own.attribute:
        if attribute.name in settings:
            attribute.i = settings[attribute.name]
    return Stacked(node=own, name=node.output[0], stack=Stack(name=own.output[0], axis=axis, pieces=pieces))


def _integers(node: NodeProto) -> dict[str, int]:
    """The attributes of `node` that are integers."""
    return {attribute.name: attribute.i for attribute in node.attribute if attribute.type == AttributeProto.INT}


def _total(pieces: Pieces) -> int:
    """The size of a stack of such pieces."""
    return sum(size * count for size, count in pieces)
