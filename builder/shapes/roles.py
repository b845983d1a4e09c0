"""What each graph input is for, found by following its data; names only break ties.

An input whose elements index a table of weights is token ids (or token types, or learned positions); an input that
becomes rotary angles is positions; an input that is added to attention scores, or selects among them, is a mask. An
input that ops append to, or write into, and that comes out again is state, and so is an input that an attention op says
it keeps.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import onnx_ir as ir

from furiosa_llm.builder.errors import OptionError
from furiosa_llm.builder.shapes.closures import CLOSURE_DOMAIN, graphs_of, num_captured
from furiosa_llm.builder.shapes.flow import as_outputs, grown_output, is_kept, reached
from furiosa_llm.runtime.artifact.manifest import SINGLE_ROLES

LENGTHS = {"past_length": "past", "sequence_length": "sequence", "total_length": "total"}
"""Roles of inputs that hold a number of positions -> the dimension that they count."""
ROLES = ("token_ids", "attention_mask", "position_ids", "token_type_ids", *LENGTHS, "state", "other")
_NAMES = (
    ("token_ids", re.compile(r"(decoder_)?input_ids|tokens|token_ids")),
    ("attention_mask", re.compile(r"(encoder_|decoder_)?attention_mask")),
    ("position_ids", re.compile(r"position_ids|cache_position")),
    ("token_type_ids", re.compile(r"token_type_ids")),
    ("state", re.compile(r"(past|cache|present).*")),
)
_INTEGERS = frozenset((ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL))
_ROLE = "furiosa_llm.role"
GIVEN = "the user says so"
_FEW_ROWS = 4
"""A table with no more rows than this is a table of token types."""

_LOOKED_UP = ("token_ids", "position_ids", "token_type_ids")
_ANGLE_PORTS = {"RotaryEmbedding": (1, 3), "MRotaryEmbedding": (1,), "GroupQueryAttention": (9,)}
_MASK_PORTS = {"Attention": (3, 5), "MultiHeadAttention": (4, 5), "GroupQueryAttention": (5, 6, 10)}
_TOKEN_PORTS = {"EmbedLayerNormalization": 0}
_LENGTH_PORTS = {
    ("", "TensorScatter"): {2: "past_length"},
    ("", "Attention"): {6: "total_length"},
    ("com.microsoft", "GroupQueryAttention"): {6: "total_length"},
}
_WRITE_PORTS = {"TensorScatter": 2, "ScatterND": 1, "ScatterElements": 1}
# fmt: off
_MOVES = frozenset((
    "Cast", "Clip", "Concat", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "Max", "Min",
    "Reshape", "Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze", "Where",
))
_ARITHMETIC = frozenset((
    "Add", "And", "CumSum", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Mul", "Neg", "Not",
    "Or", "ReduceMax", "ReduceMin", "ReduceSum", "Sub", "Sum", "Trilu", "Xor",
))
_MOVE_FIRST = frozenset(("Expand", "Gather", "GatherElements", "GatherND", "Reshape", "Slice"))
_ANGLE_FORMS = frozenset(
    ("Cast", "Expand", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze")
)
_PRODUCTS = frozenset(("Einsum", "Gemm", "MatMul"))
_WEIGHT_FORMS = frozenset(("Cast", "DequantizeLinear", "Identity", "Reshape", "Transpose"))
# fmt: on
"""Ops that may lie between an input and the node that shows its role."""


_MAX_STEPS = 200_000
"""Values that the inputs of a model are followed through, all inputs together; what is not followed to its end is taken
for what it was found to be by then. Thousands of inputs that all go through one long chain need this limit."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Role:
    """What an input is for, and from what that was inferred."""

    name: str
    why: str
    dims: tuple[int | str, ...] | None = None
    """What its dimensions are, if the user says it."""
    tie: bool = False
    """Whether the graph left a choice that the input's name settled."""


def role_of(value: ir.Value) -> str:
    """The role of a graph input."""
    return inferred_role(value).name


def inferred_role(value: ir.Value) -> Role:
    """The role of a graph input, and why; inferred from the name alone if `find_roles` has not seen the graph."""
    found = value.meta.get(_ROLE)
    return found if isinstance(found, Role) else _by_name(value)


def distinct_roles(values: Sequence[ir.Value]) -> dict[ir.Value, Role]:
    """The role of each input; of several with a role that one input may have, the others are taken for `other`.

    One that the user says has it, then one that is named for it, comes before others.
    """

    def doubt(value: ir.Value) -> tuple[bool, bool]:
        role = inferred_role(value)
        return role.why != GIVEN, role.name != _by_name(value).name

    first: dict[str, ir.Value] = {}
    for value in sorted(values, key=doubt):
        first.setdefault(role_of(value), value)
    found: dict[ir.Value, Role] = {}
    for value in values:
        role = inferred_role(value)
        if role.name in SINGLE_ROLES and (other := first[role.name]) is not value:
            role = Role(name="other", why=f"{role.why}, as for {other.name}, which is the {role.name}")
        found[value] = role
    return found


def settle_role(value: ir.Value, role: Role) -> None:
    """Set the role of an input whose role the graph does not show."""
    value.meta[_ROLE] = role


def has_roles(graph: ir.Graph) -> bool:
    """Whether the roles of the inputs have been found."""
    return all(_ROLE in value.meta for value in graph.inputs)


def find_roles(graph: ir.Graph, given: Mapping[str, Role]) -> None:
    """Find the role of every input of a normalised graph, and keep it with the input; `given` is what the user says.

    A graph is analysed once, because later passes do not change what its inputs are for.
    """
    names = [str(value.name) for value in graph.inputs]
    unknown = sorted(given.keys() - set(names))
    if unknown:
        raise OptionError(f"--role names {unknown}, but the inputs are {names}.")
    for single in SINGLE_ROLES:
        alike = [name for name in names if name in given and given[name].name == single]
        if len(alike) > 1:
            raise OptionError(
                f"--role says of {alike} that they are {single}; one input may be, say other[DIM,...] of the rest."
            )
    outside = _closure_outputs(graph)
    steps = iter(range(_MAX_STEPS))
    traces = {value: _trace(value, outside, steps) for value in graph.inputs}
    chosen = {value: given[str(value.name)] for value in graph.inputs if str(value.name) in given}
    for value, trace in traces.items():
        if value not in chosen:
            role = _by_flow(value, trace)
            if role is not None:
                chosen[value] = role
    chosen |= _lookups(graph, {v: t for v, t in traces.items() if v not in chosen and t.tables}, chosen)
    for value in graph.inputs:
        value.meta[_ROLE] = chosen.get(value) or _by_name(value)


_ALIASES = {
    "tokens": "token_ids",
    "mask": "attention_mask",
    "positions": "position_ids",
    "token_types": "token_type_ids",
}
_GIVEN = re.compile(r"([a-z_]+)(?:\[([^\[\]]*)\])?")


def read_role(name: str, text: str) -> Role:
    """What the user says of the input `name`: `positions`, or `positions[3,batch,sequence]`; OptionError otherwise."""
    match = _GIVEN.fullmatch(text.replace(" ", ""))
    role = "" if match is None else _ALIASES.get(match[1], match[1])
    if match is None or role not in ROLES:
        known = ", ".join(sorted({*_ALIASES, "state", "other"}))
        raise OptionError(f"--role {name}={text}: expected one of {known}, for instance positions[3,batch,sequence].")
    dims = None
    if match[2] is not None:
        dims = tuple(int(dim) if dim.isdecimal() else dim for dim in match[2].split(","))
    return Role(name=role, why=GIVEN, dims=dims)


def _by_name(value: ir.Value) -> Role:
    name, integer = str(value.name), value.dtype in _INTEGERS
    for role, pattern in _NAMES:
        unread = role == "state" and not value.uses() and not value.is_graph_output()  # as of layers that share a cache
        if pattern.fullmatch(name) and integer == (role != "state") and not unread:
            return Role(name=role, why="its name", tie=True)
    return Role(name="other", why="nothing tells what it is for")


# -- where the data goes -------------------------------------------------------------------------------------------


@dataclasses.dataclass(slots=True)
class _Trace:
    """What the graph does with an input's elements."""

    tables: list[ir.Value] = dataclasses.field(default_factory=list)
    """Tables of weights that the input indexes directly."""
    angles: str = ""
    scores: str = ""
    length: tuple[str, str] = ("", "")
    """The input's role as a number of positions, and why."""
    kept: str = ""
    """How the input comes out again, see `kept_by`."""


def _trace(value: ir.Value, outside: Mapping[ir.Value, Sequence[ir.Value]], steps: Iterator[int]) -> _Trace:
    """Follow an input for as long as there are `steps` left."""
    found = _Trace()
    if value.dtype is None:
        return found
    integer = value.dtype in _INTEGERS
    seen: set[tuple[ir.Value, bool]] = set()
    queue = [(value, True)]
    while queue:
        current, plain = queue.pop()
        if (current, plain) in seen:
            continue
        if next(steps, None) is None:
            break
        seen.add((current, plain))
        for node, port in current.uses():
            if _is_end(node, port, found, plain=plain):
                continue
            moved = node.op_type in _MOVES and not (port and node.op_type in _MOVE_FIRST)
            if moved or node.op_type in _ARITHMETIC or (integer and node.op_type in _PRODUCTS):
                queue.extend((output, plain and moved) for output in node.outputs)
            elif node.domain == CLOSURE_DOMAIN:
                queue.extend((inner, plain) for inner in _passed_into(node, port))
        queue.extend((outer, plain) for outer in outside.get(current, ()))
    if not integer or value.dtype is ir.DataType.INT32:
        found.kept = kept_by(value)
    return found


def _is_end(node: ir.Node, port: int, found: _Trace, *, plain: bool) -> bool:
    """Note what `node` does with its input `port`; returns whether the trace ends there."""
    op = node.op_type
    length = _LENGTH_PORTS.get((node.domain, op), {}).get(port)
    if length is not None:
        if plain:
            found.length = (length, f"{_shown(node)} takes it for that")
        return True
    if op in ("Gather", "GatherBlockQuantized") and port == 1:
        table = _weight(node.inputs[0])
        if table is not None and plain:
            found.tables.append(table)
            if _becomes_angles(node.outputs[0]):
                found.angles = found.angles or f"{_shown(node)} looks up rotary angles by it"
        return True
    if _TOKEN_PORTS.get(op) == port and node.inputs[2] is not None:
        found.tables.append(node.inputs[2])
        return True
    if op in ("Cos", "Sin") or port in _ANGLE_PORTS.get(op, ()):
        found.angles = found.angles or f"{_shown(node)} makes rotary angles of it"
        return True
    if (op == "Softmax" and port == 0) or port in _MASK_PORTS.get(op, ()):
        found.scores = found.scores or f"it reaches the attention scores of {_shown(node)}"
        return True
    return op in ("Shape", "Size") or _WRITE_PORTS.get(op) == port


def _shown(node: ir.Node) -> str:
    return f'{node.op_type} "{node.name}"'


def _passed_into(node: ir.Node, port: int) -> Iterator[ir.Value]:
    """The values that stand for a captured input in the graphs of a closure."""
    own = len(node.inputs) - num_captured(node)
    if port >= own:
        for graph in graphs_of(node):
            yield graph.inputs[len(graph.inputs) - num_captured(node) + port - own]


def _closure_outputs(graph: ir.Graph) -> dict[ir.Value, list[ir.Value]]:
    """Output of a graph of a closure in `graph` -> the closure's outputs that it becomes."""
    found: dict[ir.Value, list[ir.Value]] = {}
    for node in graph:
        if node.domain == CLOSURE_DOMAIN and node.op_type == "If":
            for branch in graphs_of(node):
                for own, outer in zip(branch.outputs, node.outputs, strict=True):
                    found.setdefault(own, []).append(outer)
    return found


def _weight(value: ir.Value | None) -> ir.Value | None:
    """The table of weights, of two or more dimensions, of which `value` is another form; None if there is none."""
    while value is not None and not value.is_initializer():
        node = value.producer()
        if node is None or node.op_type not in _WEIGHT_FORMS:
            return None
        value = node.inputs[0]
    return value if value is not None and value.shape is not None and len(value.shape) > 1 else None


def _becomes_angles(value: ir.Value) -> bool:
    """Whether the looked-up rows are only multiplied with computed values, as rows of rotary angles are."""

    def joins(node: ir.Node) -> bool:
        return node.op_type == "Concat" and not node.outputs[0].is_graph_output()

    turned = False
    for rows in reached([value], lambda node, port: (node.op_type in _ANGLE_FORMS and port == 0) or joins(node)):
        for node, port in rows.uses():
            if node.op_type in _ANGLE_FORMS and port == 0:
                continue
            if not (_turns(node, port) or joins(node)):
                return False
            turned = True
    return turned


def _turns(node: ir.Node, port: int) -> bool:
    """Whether `node` turns vectors by its input `port`: multiplies it with them, or is a rotary embedding."""
    if node.op_type != "Mul":
        return node.op_type == "RotaryEmbedding" and port > 0
    other = node.inputs[1 - port]
    source = None if other is None else other.producer()
    if source is not None and source.op_type in ("Cast", "CastLike"):
        other = source.inputs[0]
    return other is not None and not other.is_initializer() and other is not node.inputs[port]


def kept_by(value: ir.Value) -> str:
    """How the input comes out again: which op appends to it, or writes into it; empty if no op does."""
    for form in reached([value], is_kept):
        for node, port in form.uses():
            grown = grown_output(node, port)
            if grown is not None and any(as_outputs(grown)):
                return f"{_shown(node)} adds to it, and the result is an output"
    return ""


# -- what the trace says -------------------------------------------------------------------------------------------


def _by_flow(value: ir.Value, trace: _Trace) -> Role | None:
    """The role that the trace shows beyond doubt; None if it shows none."""
    rank = 0 if value.shape is None else len(value.shape)
    named = _by_name(value)
    if trace.kept and rank > 1:
        return Role(name="state", why=trace.kept)
    if trace.length[0] and rank < 2 and value.dtype in _INTEGERS:  # positions may be counted from it, too
        return Role(name=trace.length[0], why=trace.length[1])
    scaled = bool(trace.tables) and named.name == "token_ids"  # rows that are multiplied at once, as by a mask
    if value.dtype in _INTEGERS and trace.angles and value.dtype is not ir.DataType.BOOL and not scaled:
        return Role(name="position_ids", why=trace.angles)
    if trace.tables or not trace.scores or rank < 2 or named.name == "state":
        return None
    if named.name == "position_ids":  # positions may be compared to hide what comes later
        return Role(name="position_ids", why=f"{trace.scores}; its name tells positions from a mask", tie=True)
    return Role(name="attention_mask", why=trace.scores)


def _lookups(
    graph: ir.Graph, found: Mapping[ir.Value, _Trace], chosen: Mapping[ir.Value, Role]
) -> dict[ir.Value, Role]:
    """The roles of inputs that index tables; the largest table holds the vocabulary."""
    roles: dict[ir.Value, Role] = {}
    taken = {role.name for role in chosen.values()}
    by_name = {role.name for value, role in chosen.items() if role.why == GIVEN or _by_name(value).name == role.name}
    for value in sorted(found, key=lambda v: -max(map(_rows, found[v].tables))):
        why = f'it indexes the table "{found[value].tables[0].name}"'
        named, rows = _by_name(value), max(map(_rows, found[value].tables))
        free = [role for role in ("token_ids", "position_ids") if role not in taken]
        types = rows <= _FEW_ROWS and "token_type_ids" not in taken
        if named.name in _LOOKED_UP and named.name not in by_name and len(found) + len(taken & {"token_ids"}) > 1:
            role = Role(name=named.name, why=f"{why}, and its name", tie=True)
        elif "position_ids" in free and named.name != "token_ids" and _is_embedded(graph, found[value].tables, value):
            role = Role(name="position_ids", why=f"{why}, and another input has the embeddings")
        else:
            role = Role(name="token_type_ids" if types else next(iter(free), "other"), why=why)
        roles[value] = role
        taken.add(role.name)
        by_name |= {role.name} & {named.name}
    return roles


def _is_embedded(graph: ir.Graph, tables: list[ir.Value], value: ir.Value) -> bool:
    """Whether another input has vectors as wide as a table's rows, one for each position.

    There is one for each position if the symbols say so, or if the rows are added to them.
    """
    widths = {math.prod(t.shape.numpy()[1:]) for t in tables if t.shape is not None}
    added = _added_to_rows(value)
    return any(
        shape is not None
        and len(shape) == 3
        and shape[2] in widths
        and value.shape is not None
        and (str(shape[1]) == str(value.shape[-1]) or other in added)
        for other in graph.inputs
        if other.dtype is not None and other.dtype.is_floating_point()
        for shape in (other.shape,)
    )


def _added_to_rows(value: ir.Value) -> set[ir.Value | None]:
    """What is added to the rows that `value` looks up."""
    lookups = [node for form in reached([value], is_kept) for node, port in form.uses() if port == 1]
    readers = (reader for node in lookups if node.op_type == "Gather" for reader, _ in node.outputs[0].uses())
    return {operand for reader in readers if reader.op_type == "Add" for operand in reader.inputs}


def _rows(table: ir.Value) -> int:
    return table.shape.numpy()[0] if table.shape is not None else 0
