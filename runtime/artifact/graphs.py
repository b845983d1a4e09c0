"""The graphs inside the nodes of a model, the names that nodes read, and the domain of collectives."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping

from onnx import AttributeProto, GraphProto, NodeProto, TensorProto

COLLECTIVE_DOMAIN = "furiosa_llm"


def attribute_graphs(node: NodeProto) -> Iterator[GraphProto]:
    """The graphs that are attributes of `node` (If, Loop, Scan), themselves only."""
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == AttributeProto.GRAPHS:
            yield from attribute.graphs


def all_nodes(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    """`nodes`, each followed by those in its graphs, at any depth."""
    for node in nodes:
        yield node
        for graph in attribute_graphs(node):
            yield from all_nodes(graph.node)


def all_graphs(nodes: Iterable[NodeProto]) -> Iterator[GraphProto]:
    """The graphs in `nodes`, at any depth."""
    for node in all_nodes(nodes):
        yield from attribute_graphs(node)


def all_tensors(nodes: Iterable[NodeProto]) -> Iterator[TensorProto]:
    """Every tensor that is an attribute of a node, or an initializer of a graph, in `nodes` at any depth."""
    for node in all_nodes(nodes):
        for attribute in node.attribute:
            if attribute.type == AttributeProto.TENSOR:
                yield attribute.t
            yield from attribute.tensors
        for graph in attribute_graphs(node):
            yield from graph.initializer


def used_names(node: NodeProto) -> Iterator[str]:
    """The names that `node` reads, what its graphs capture from outside included."""
    yield from filter(None, node.input)
    for graph in attribute_graphs(node):
        defined = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
        for inner in graph.node:
            yield from (name for name in used_names(inner) if name not in defined)
            defined.update(inner.output)
        yield from (value.name for value in graph.output if value.name not in defined)


def rename(node: NodeProto, names: Mapping[str, str]) -> None:
    """Gives the outer values that `node` and the graphs in it read, or make, their names in `names`."""
    for values in (node.input, node.output):
        renamed = [names.get(name, name) for name in values]
        del values[:]
        values.extend(renamed)
    for graph in attribute_graphs(node):
        own = {given.name for given in (*graph.input, *graph.initializer)}
        own.update(name for inner in graph.node for name in inner.output)
        outside = {name: new for name, new in names.items() if name not in own}
        for inner in graph.node:
            rename(inner, outside)
        for value in graph.output:
            value.name = outside.get(value.name, value.name)


def renamed(node: NodeProto, names: Mapping[str, str], prefix: str) -> NodeProto:
    """A copy of `node` that reads and makes the values `names` stand for, and whose own name begins with `prefix`."""
    own = NodeProto()
    own.CopyFrom(node)
    own.name = f"{prefix}/{node.name}" if node.name else ""
    rename(own, names)
    return own


def following(nodes: Iterable[NodeProto], names: Collection[str] = (), *, sizes: bool = True) -> set[str]:
    """The values that follow from collectives or from `names`; without `sizes`, from their elements alone."""
    found = set(names)
    for node in nodes:
        if node.domain == COLLECTIVE_DOMAIN or (
            (sizes or node.op_type != "Shape") and not found.isdisjoint(used_names(node))
        ):
            found.update(name for name in node.output if name)
    return found - {*names}
