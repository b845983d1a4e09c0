"""Turn closures back into ONNX's own form."""

from __future__ import annotations

from collections import ChainMap

from onnx import AttributeProto, GraphProto, ModelProto, NodeProto

from furiosa_llm.builder.shapes.closures import CAPTURED, CLOSURE_DOMAIN
from furiosa_llm.builder.shapes.names import FreeNames


def open_closures(model: ModelProto) -> None:
    """Turn the closures of `model` into ONNX's own form, in place: graphs read captured values by their names."""
    taken = {name for node in model.graph.node for name in node.output}
    free = FreeNames(taken | {value.name for value in (*model.graph.input, *model.graph.initializer)})
    for node in model.graph.node:
        if node.domain == CLOSURE_DOMAIN:
            _open(node, free)


def _open(node: NodeProto, free: FreeNames) -> None:
    count = next(attribute.i for attribute in node.attribute if attribute.name == CAPTURED)
    own = len(node.input) - count
    captured = list(node.input[own:])
    del node.input[own:]
    while node.input and not node.input[-1]:
        del node.input[-1]
    node.domain = ""
    kept = [attribute for attribute in node.attribute if attribute.name != CAPTURED]
    for attribute in kept:
        if attribute.type == AttributeProto.GRAPH:
            placeholders = [value.name for value in attribute.g.input[len(attribute.g.input) - count :]]
            del attribute.g.input[len(attribute.g.input) - count :]
            names = dict(zip(placeholders, captured, strict=True))
            _rename(attribute.g, ChainMap(names), f"{node.name}/{attribute.name}", free)
    del node.attribute[:]
    node.attribute.extend(kept)


def _rename(graph: GraphProto, outer: ChainMap[str, str], prefix: str, free: FreeNames) -> None:
    """Give the values of a graph names that are used nowhere else; `outer` are the new names of those around it."""
    names = outer.new_child()

    def fresh(name: str) -> str:
        names[name] = free.take(f"{prefix}/{name}")
        return names[name]

    del graph.value_info[:]
    for value in graph.input:
        value.name = fresh(value.name)
    for node in graph.node:
        inputs = [names[name] if name else "" for name in node.input]
        outputs = [fresh(name) if name else "" for name in node.output]
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                _rename(attribute.g, names, f"{prefix}/{node.name}/{attribute.name}", free)
        del node.input[:], node.output[:]
        node.input.extend(inputs)
        node.output.extend(outputs)
    for value in graph.output:
        value.name = names[value.name]
