"""Cuts an SPMD program at its collectives into sections: a segment that every rank runs, then collectives.

A node goes to the earliest segment that its inputs allow, so collectives that do not wait for one another fall into one
section and share a barrier. Nodes that read initializers only are repeated in each segment that needs them, because
onnxruntime folds them away when it loads the segment.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from onnx import FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

from furiosa_llm.runtime.artifact.dimensions import known_sizes, parse_dimension
from furiosa_llm.runtime.artifact.errors import ArtifactError
from furiosa_llm.runtime.artifact.graphs import COLLECTIVE_DOMAIN, attribute_graphs, used_names
from furiosa_llm.runtime.artifact.json_reader import REBUILD
from furiosa_llm.runtime.artifact.manifest import PROGRAM_NAME, Collective, Manifest

_OPSET = 21
"""The opset of the standard ops in a part whose own nodes are all of other domains: standard ops add its sums."""

_FOLDED = -1
"""The section of values that depend on initializers only: they belong to whichever segments read them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueType:
    """A value's local type: ONNX's dtype name, and its shape where every dimension is a size or an expression."""

    dtype: str
    shape: tuple[int | str, ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Nodes that run without waiting for other ranks."""

    nodes: tuple[int, ...]
    """The nodes' positions in the program's graph."""
    inputs: tuple[str, ...]
    """The graph inputs and the values of earlier sections that the nodes read."""
    outputs: tuple[str, ...]
    """The values that later sections, collectives or the caller read."""
    initializers: tuple[str, ...]
    """The names of the initializers that the nodes read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveCall:
    """One collective node: what it does, the value it reads and the value it writes."""

    collective: Collective
    input: str
    output: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A segment (None: nothing to compute), then the collectives whose inputs are known after it."""

    segment: Segment | None
    collectives: tuple[CollectiveCall, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """The sections of a program in order, its inputs and outputs, and the types of all values that cross a section."""

    model: ModelProto
    sections: tuple[Section, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    types: Mapping[str, ValueType]
    sizes: frozenset[str]
    """The names of the dynamic dimensions that the inputs' shapes give."""

    def has_known_shape(self, kind: ValueType) -> bool:
        """Whether the sizes of the inputs give the shape of a value of this type."""
        dims = [dim for dim in kind.shape or () if isinstance(dim, str)]
        return kind.shape is not None and all(self.sizes.issuperset(parse_dimension(dim).names) for dim in dims)


def cut_program(model: ModelProto, collectives: Sequence[Collective], sizes: frozenset[str]) -> Program:
    """The sections of `model`, all or a part of a program that `open_artifact` has checked.

    `collectives` belong to its collective nodes, in their order; `sizes` are the dynamic dimensions that its inputs
    give. Raises ArtifactError if `value_info` lacks the type of a value that crosses from section to section.
    """
    graph = model.graph
    calls = {
        node.output[0]: CollectiveCall(collective=collective, input=node.input[0], output=node.output[0])
        for node, collective in zip(
            (node for node in graph.node if node.domain == COLLECTIVE_DOMAIN), collectives, strict=True
        )
    }
    produced_at = _levels(graph)
    members = _members(graph, produced_at)
    crossing = _crossing(graph, produced_at, members, calls.values())
    sections: list[Section] = []
    for level in range(1 + max(produced_at.values())):
        segment = _segment(graph, members[level], level, produced_at, crossing) if level in members else None
        ready = tuple(call for call in calls.values() if max(produced_at[call.input], 0) == level)
        if segment is not None or ready:
            sections.append(Section(segment=segment, collectives=ready))
    return Program(
        model=model,
        sections=tuple(sections),
        inputs=tuple(value.name for value in graph.input),
        outputs=tuple(value.name for value in graph.output),
        types=_types(graph, crossing),
        sizes=sizes,
    )


def program_part(program: Program, nodes: Sequence[NodeProto]) -> ModelProto:
    """A model of `nodes` with the program's opsets and the functions they use, without inputs and outputs."""
    source = program.model
    model = ModelProto(ir_version=source.ir_version, graph=GraphProto(name="segment", node=nodes))
    model.opset_import.extend(entry for entry in source.opset_import if entry.domain != COLLECTIVE_DOMAIN)
    if not any(entry.domain in ("", "ai.onnx") for entry in model.opset_import):
        model.opset_import.add(domain="", version=_OPSET)
    model.functions.extend(_used_functions(source, nodes))
    return model


def growing_values(program: Program, names: frozenset[str]) -> frozenset[str]:
    """The values whose shape depends on one of the dynamic dimensions `names`."""
    return frozenset(
        value
        for value, kind in program.types.items()
        if any(names.intersection(parse_dimension(dim).names) for dim in kind.shape or () if isinstance(dim, str))
    )


def _used_functions(model: ModelProto, nodes: Iterable[NodeProto]) -> list[FunctionProto]:
    known = {(function.domain, function.name, function.overload): function for function in model.functions}
    used: dict[tuple[str, str, str], FunctionProto] = {}
    pending = list(nodes) if known else []
    while pending:
        node = pending.pop()
        pending.extend(inner for graph in attribute_graphs(node) for inner in graph.node)
        key = (node.domain, node.op_type, node.overload)
        if key in known and key not in used:
            used[key] = known[key]
            pending.extend(known[key].node)
    return list(used.values())


def _levels(graph: GraphProto) -> dict[str, int]:
    """The section that makes each value; the output of a collective is made by the section after the collective's."""
    levels = {value.name: 0 for value in graph.input}
    levels.update({tensor.name: _FOLDED for tensor in graph.initializer})
    for node in graph.node:
        level = max((levels[name] for name in used_names(node)), default=_FOLDED)
        if node.domain == COLLECTIVE_DOMAIN:
            level = max(level, 0) + 1
        levels.update({name: level for name in node.output if name})
    return levels


def _members(graph: GraphProto, levels: Mapping[str, int]) -> dict[int, tuple[int, ...]]:
    """The positions of the nodes of each section, including the foldable nodes that they need."""
    producer = {name: position for position, node in enumerate(graph.node) for name in node.output if name}
    needed: dict[int, set[int]] = {}

    def include(level: int, names: Iterable[str]) -> None:
        pending = list(names)
        while pending:
            name = pending.pop()
            position = producer.get(name)
            if position is None or levels[name] != _FOLDED or position in needed.setdefault(level, set()):
                continue
            needed[level].add(position)
            pending.extend(used_names(graph.node[position]))

    for position, node in enumerate(graph.node):
        level = max((levels[name] for name in node.output if name), default=_FOLDED)
        if node.domain == COLLECTIVE_DOMAIN:
            include(level - 1, node.input)
        elif level != _FOLDED:
            needed.setdefault(level, set()).add(position)
            include(level, used_names(node))
    include(0, (value.name for value in graph.output))
    return {level: tuple(sorted(positions)) for level, positions in needed.items()}


def _crossing(
    graph: GraphProto,
    levels: Mapping[str, int],
    members: Mapping[int, Sequence[int]],
    calls: Iterable[CollectiveCall],
) -> set[str]:
    """The values that leave a segment: read by another one, by a collective, or by the caller."""
    read_by_others = {
        name
        for level, positions in members.items()
        for position in positions
        for name in used_names(graph.node[position])
        if levels[name] not in (level, _FOLDED)
    }
    collective_values = {name for call in calls for name in (call.input, call.output)}
    return read_by_others | collective_values | {value.name for value in graph.output}


def _segment(
    graph: GraphProto, positions: Sequence[int], level: int, levels: Mapping[str, int], crossing: set[str]
) -> Segment:
    nodes = [graph.node[position] for position in positions]
    produced = [name for node in nodes for name in node.output if name]
    known = {tensor.name for tensor in graph.initializer}
    read = list(dict.fromkeys(name for node in nodes for name in used_names(node)))
    inside = set(produced)
    return Segment(
        nodes=tuple(positions),
        inputs=tuple(name for name in read if name not in inside and name not in known),
        outputs=tuple(name for name in produced if name in crossing and max(levels[name], 0) == level),
        initializers=tuple(name for name in read if name in known),
    )


def _types(graph: GraphProto, crossing: set[str]) -> dict[str, ValueType]:
    declared = {value.name: value for value in (*graph.value_info, *graph.input, *graph.output)}
    names = crossing | {value.name for value in graph.input}
    types: dict[str, ValueType] = {}
    for name in names:
        value = declared.get(name)
        if value is None or value.type.tensor_type.elem_type == TensorProto.UNDEFINED:
            raise ArtifactError(
                f"{PROGRAM_NAME}: value_info has no type for {name!r:.80}, which crosses a collective; {REBUILD}"
            )
        types[name] = ValueType(dtype=TensorProto.DataType.Name(value.type.tensor_type.elem_type), shape=_shape(value))
    return types


def size_names(manifest: Manifest) -> frozenset[str]:
    """The names of the dynamic dimensions that the shapes of an artifact's inputs give."""
    dims = {dim for info in manifest.inputs for dim in info.shape if isinstance(dim, str)}
    names = {name for dim in dims for name in parse_dimension(dim).names}
    return frozenset(known_sizes(dict.fromkeys(names, 0)))


def _shape(value: ValueInfoProto) -> tuple[int | str, ...] | None:
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        return None
    shape: list[int | str] = []
    for dim in tensor.shape.dim:
        if dim.HasField("dim_value"):
            shape.append(dim.dim_value)
            continue
        try:
            parse_dimension(dim.dim_param)
        except ArtifactError:
            return None
        shape.append(dim.dim_param)
    return tuple(shape)
