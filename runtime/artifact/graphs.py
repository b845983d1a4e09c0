"""The graphs inside a node of a program, the names that it reads, and the domain of collectives."""

from __future__ import annotations

from collections.abc import Iterator

from onnx import AttributeProto, GraphProto, NodeProto

COLLECTIVE_DOMAIN = "furiosa_llm"


def attribute_graphs(node: NodeProto) -> Iterator[GraphProto]:
    """The graphs that are attributes of `node` (If, Loop, Scan), themselves only."""
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def used_names(node: NodeProto) -> Iterator[str]:
    """The names that `node` reads, those that its graphs capture from outside included."""
    yield from (name for name in node.input if name)
    for graph in attribute_graphs(node):
        own = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
        for inner in graph.node:
            yield from (name for name in used_names(inner) if name not in own)
            own.update(inner.output)
        yield from (value.name for value in graph.output if value.name not in own)
