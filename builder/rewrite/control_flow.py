"""Make closures of If, Loop and Scan (see `shapes.closures`), and replace an If by one of its branches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import onnx_ir as ir

from furiosa_llm.builder.errors import UnsupportedModelError
from furiosa_llm.builder.shapes.closures import (
    BRANCHES,
    CAPTURED,
    CLOSURE_DOMAIN,
    graphs_of,
    graphs_within,
    is_control_flow,
    nodes_within,
    num_captured,
    with_inner,
)
from furiosa_llm.builder.shapes.names import FreeNames

ORIGINAL_NAME = "original_name"
"""The key under which a copy of an initializer carries the name of the original."""

_TRIED = "tried_numbers"
"""The key under which a graph carries, for each name of an initializer, the first number not yet tried behind it."""
_OLDEST_SCAN = 9
"""Before this opset, Scan worked on batches."""


# -- closing -------------------------------------------------------------------------------------------------------


def close(graph: ir.Graph, nodes: Iterable[ir.Node] | None = None) -> None:
    """Make every node of `graph` that has graphs a closure; the initializers of these graphs move to `graph`.

    If `nodes` are given, only these are looked at. Raises UnsupportedModelError for ops with graphs other than If, Loop
    and Scan.
    """
    for node in graph if nodes is None else nodes:
        if node.domain == CLOSURE_DOMAIN or not graphs_of(node):
            continue
        for inner in (node, *nodes_within(node)):
            _check(inner, graph.opset_imports.get("", 1))
        for inner_graph in graphs_within(node):
            _hoist_initializers(inner_graph, graph)
        captured = list(_captured(node))
        for inner_graph in graphs_of(node):
            _pass_in(inner_graph, captured)
        for inner_graph in graphs_within(node):
            _compute_outputs(inner_graph)
        _name_apart(node)
        own = len(node.inputs)
        node.resize_inputs(own + len(captured))
        for position, value in enumerate(captured, start=own):
            node.replace_input_with(position, value)
        node.attributes[CAPTURED] = ir.AttrInt64(CAPTURED, len(captured))
        node.domain = CLOSURE_DOMAIN


def _check(node: ir.Node, opset: int) -> None:
    if graphs_of(node) and not is_control_flow(node):
        raise UnsupportedModelError(
            f'node {node.op_type} "{node.name}" has a graph as attribute, expected If, Loop or Scan to be the only ops '
            "that have; export the model without it."
        )
    if node.op_type == "Scan" and not node.domain and opset < _OLDEST_SCAN:
        raise UnsupportedModelError(
            f'node Scan "{node.name}" is of opset {opset}, expected {_OLDEST_SCAN} or later; export the model again.'
        )


def _hoist_initializers(inner: ir.Graph, graph: ir.Graph) -> None:
    for value in list(inner.initializers.values()):
        copy = add_initializer(graph, value, str(value.name))
        value.replace_all_uses_with(copy, replace_graph_outputs=True)
        inner.initializers.pop(str(value.name))


def add_initializer(graph: ir.Graph, initializer: ir.Value, name: str) -> ir.Value:
    """A new initializer of `graph` with the same tensor; renaming a value would also rename the source's tensor."""
    tried: dict[str, int] = graph.meta.setdefault(_TRIED, {})
    free, number = name, tried.get(name, 1)
    while free in graph.initializers:
        free, number = f"{name}/{number}", number + 1
    tried[name] = number
    tensor = initializer.const_value
    copy = ir.Value(name=free, shape=initializer.shape, type=initializer.type, const_value=tensor)
    copy.meta[ORIGINAL_NAME] = initializer.meta.get(ORIGINAL_NAME, initializer.name)
    graph.register_initializer(copy)
    return copy


def _captured(node: ir.Node) -> dict[ir.Value, None]:
    """The values that the graphs of `node` read but do not contain, in order."""
    own: set[ir.Value] = set()
    read: dict[ir.Value, None] = {}
    for graph in graphs_within(node):
        own.update(graph.inputs)
        for inner in graph:
            own.update(inner.outputs)
            read.update((value, None) for value in inner.inputs if value is not None)
        read.update(dict.fromkeys(graph.outputs))
    return {value: None for value in read if value not in own}


def _pass_in(graph: ir.Graph, captured: Sequence[ir.Value]) -> None:
    """Make `graph` read new inputs of its own in place of the captured values."""
    given = {v: ir.Value(name=v.name, type=v.type, shape=v.shape) for v in captured}
    graph.inputs.extend(given.values())
    for inner in with_inner(graph):
        for node in inner:
            for position, value in enumerate(node.inputs):
                if value in given:
                    node.replace_input_with(position, given[value])
        for position, value in enumerate(inner.outputs):
            if value in given:
                inner.outputs[position] = given[value]


def _compute_outputs(graph: ir.Graph) -> None:
    """Make a node compute every output, each once: kernels do not accept outside values as outputs of a branch."""
    seen: set[ir.Value] = set()
    for position, value in enumerate(graph.outputs):
        producer = value.producer()
        if producer is None or producer.graph is not graph or value in seen:
            output = ir.Value(name=f"{value.name}/output", type=value.type, shape=value.shape)
            graph.append(ir.Node("", "Identity", [value], outputs=[output]))
            graph.outputs[position] = output
        seen.add(value)


def _name_apart(node: ir.Node) -> None:
    """Give all values in the graphs of `node` different names: captured values still have their names from outside."""
    free = FreeNames()
    for graph in graphs_within(node):
        for value in (*graph.inputs, *(output for inner in graph for output in inner.outputs)):
            if value.name != "":
                value.name = free.take(f"{value.name}")


# -- inlining ------------------------------------------------------------------------------------------------------


def splice(graph: ir.Graph, node: ir.Node, branch: ir.Graph) -> list[ir.Value]:
    """Move the nodes of a branch of the closure `node` before `node`; returns the branch's outputs."""
    captured = node.inputs[len(node.inputs) - num_captured(node) :]
    for inside, outside in zip(branch.inputs, captured, strict=True):
        assert outside is not None
        inside.replace_all_uses_with(outside)
    outputs, nodes = list(branch.outputs), list(branch)
    branch.outputs.clear()
    branch.remove(nodes)
    for inner in nodes:
        inner.name = f"{node.name}/{inner.name}"
        for value in inner.outputs:
            value.name = f"{node.name}/{value.name}" if value.name else value.name
    graph.insert_before(node, nodes)
    close(graph, nodes)
    return outputs


def take_branch(graph: ir.Graph, node: ir.Node, *, condition: bool) -> None:
    """Replace a closed If by the branch that is always taken."""
    branch = node.attributes[BRANCHES[0 if condition else 1]].as_graph()
    replace_outputs(graph, node, splice(graph, node, branch))


def replace_outputs(graph: ir.Graph, node: ir.Node, values: Sequence[ir.Value]) -> dict[ir.Value, ir.Value]:
    """Remove `node`, whose outputs are now `values`; they keep their names.

    Returns what takes the place of each output that is read.
    """
    found: dict[ir.Value, ir.Value] = {}
    for old, new in zip(node.outputs, values, strict=True):
        if not old.uses() and not old.is_graph_output():
            continue
        # The new value may be one that the graph has already.
        alias = ir.Node("", "Identity", [new], name=f"{old.name}/branch")
        alias.outputs[0].name = old.name
        alias.outputs[0].type, alias.outputs[0].shape = old.type, old.shape
        graph.insert_before(node, alias)
        old.replace_all_uses_with(alias.outputs[0], replace_graph_outputs=True)
        found[old] = alias.outputs[0]
    graph.remove(node, safe=True)
    return found


def take_constant_branches(graph: ir.Graph) -> None:
    """Replace every closed If whose condition is an initializer by the branch that is taken."""
    pending = list(graph)[::-1]
    while pending:
        node = pending.pop()
        condition = constant_condition(node) if node.domain == CLOSURE_DOMAIN else None
        if condition is not None:
            pending += list(node.attributes[BRANCHES[0 if condition else 1]].as_graph())[::-1]
            take_branch(graph, node, condition=condition)


def constant_condition(node: ir.Node) -> bool | None:
    """The condition of an If if it is an initializer of one element, else None."""
    value = node.inputs[0] if node.op_type == "If" else None
    if value is None or not value.is_initializer() or value.is_graph_input():
        return None
    tensor = value.const_value
    return None if tensor is None or tensor.size != 1 else bool(tensor.numpy().item())
