"""In what two ONNX graphs differ: nodes by name, inputs and outputs, and the rest of the model by field."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from onnx import ModelProto, NodeProto, ValueInfoProto

_COMPARED = frozenset({"node", "initializer", "input", "output"})
"""Fields of a graph that are compared by themselves; initializers are compared as weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """Named things that are in the second collection only, in the first only, and in both but different."""

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeChange:
    """A node that is in both graphs, and the fields of its protobuf message that differ (`op_type`, `input`, ...)."""

    name: str
    fields: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphDiff:
    """How two graphs differ; a node without a name of its own is called by its op and its first output.

    `other` are fields of the model (`opset_import`, `functions`, `graph.value_info`, ...) that differ, and `order of
    nodes`, `order of inputs` or `order of outputs` where the same ones stand in another order.
    """

    nodes_added: tuple[str, ...] = ()
    nodes_removed: tuple[str, ...] = ()
    nodes_changed: tuple[NodeChange, ...] = ()
    inputs: Names = Names()
    outputs: Names = Names()
    other: tuple[str, ...] = ()


def compare_named(a: Mapping[str, object], b: Mapping[str, object]) -> Names:
    """How two mappings differ."""
    return Names(
        added=tuple(name for name in b if name not in a),
        removed=tuple(name for name in a if name not in b),
        changed=tuple(name for name in a if name in b and a[name] != b[name]),
    )


def compare_graphs(a: ModelProto, b: ModelProto) -> GraphDiff:
    """How model `b` differs from model `a`, initializers left out."""
    nodes = _by_name(a.graph.node, b.graph.node)
    names = compare_named(*nodes)
    inputs, outputs = ([_by_value(getattr(side.graph, key)) for side in (a, b)] for key in ("input", "output"))
    ordered = {"nodes": nodes, "inputs": inputs, "outputs": outputs}
    return GraphDiff(
        nodes_added=names.added,
        nodes_removed=names.removed,
        nodes_changed=tuple(
            NodeChange(name=name, fields=tuple(_fields(nodes[0][name], nodes[1][name]))) for name in names.changed
        ),
        inputs=compare_named(*inputs),
        outputs=compare_named(*outputs),
        other=(
            *(field for field in _fields(a, b) if field != "graph"),
            *(f"graph.{field}" for field in _fields(a.graph, b.graph) if field not in _COMPARED),
            *(f"order of {what}" for what, (one, other) in ordered.items() if _is_reordered(one, other)),
        ),
    )


def _by_name(a: Collection[NodeProto], b: Collection[NodeProto]) -> list[dict[str, NodeProto]]:
    repeated = {name for side in (a, b) for name, count in Counter(node.name for node in side).items() if count > 1}

    def name_of(node: NodeProto) -> str:
        if node.name and node.name not in repeated:
            return str(node.name)
        return f"{node.op_type} {next(filter(None, node.output), '')}"

    return [{name_of(node): node for node in side} for side in (a, b)]


def _by_value(values: Sequence[ValueInfoProto]) -> dict[str, ValueInfoProto]:
    return {value.name: value for value in values}


def _fields(a: Any, b: Any) -> Iterator[str]:
    """The fields in which two protobuf messages of one type differ."""
    for field in a.DESCRIPTOR.fields:
        if getattr(a, field.name) != getattr(b, field.name):
            yield field.name


def _is_reordered(a: Collection[str], b: Collection[str]) -> bool:
    both = set(a) & set(b)
    return [name for name in a if name in both] != [name for name in b if name in both]
