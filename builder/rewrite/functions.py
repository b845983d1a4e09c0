"""Model-local functions: every call is replaced by a copy of the function's body.

All calls are inlined in one pass over the nodes, because a file of a few kilobytes may stand for a hundred thousand.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import onnx
import onnx_ir as ir

from furiosa_llm.builder.errors import ModelLoadError, UnsupportedModelError
from furiosa_llm.builder.shapes.closures import graphs_of
from furiosa_llm.builder.shapes.names import FreeNames
from furiosa_llm.builder.source.validate_nodes import check_node

_GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


def inline_functions(model: ir.Model, name: str) -> None:
    """Inline every function of `model`, in place; `name` is the file's name in errors.

    Raises UnsupportedModelError if a function uses an op that has changed since the opset of the function, or takes a
    graph as an attribute.
    """
    _harmonize_opsets(model, name)
    _Inliner(model, name).run(model.graph)
    model.functions.clear()


class _Inliner:
    def __init__(self, model: ir.Model, name: str) -> None:
        self._name = name
        self._imports = dict(model.graph.opset_imports)
        self._functions = dict(model.functions)
        self._names = FreeNames(str(v.name) for graph in model.graphs() for v in _values_of(graph))

    def run(self, graph: ir.Graph) -> None:
        """Inline the calls in `graph`, in inlined bodies, and in the graphs inside nodes."""
        pending = list(graph)
        while pending:
            node = pending.pop()
            function = self._functions.get(node.op_identifier())
            if function is not None:
                pending += self._inline(node, function)
                continue
            for inner in graphs_of(node):
                pending += list(inner)

    def _inline(self, call: ir.Node, function: ir.Function) -> Sequence[ir.Node]:
        """Replace `call` by a copy of the function's body; returns the copy's nodes."""
        graph = call.graph
        assert isinstance(graph, ir.Graph)
        defaults = {a.name: a for a in function.attributes.values() if a.value is not None}
        body = function.graph.clone()
        changed = _set_attributes(body, {**defaults, **call.attributes})
        self._name_apart(body)
        arguments = [*call.inputs, *[None] * (len(body.inputs) - len(call.inputs))]
        for parameter, argument in zip(body.inputs, arguments, strict=True):
            changed += _replace(parameter, argument)
        self._check(changed)
        results = _outputs(body, arguments)
        nodes = list(body)
        body.outputs.clear()
        body.remove(nodes)
        graph.insert_before(call, nodes)
        for old, new in zip(call.outputs, results, strict=False):
            self._pass_on(graph, call, old, new)
        graph.remove(call, safe=True)
        return nodes

    def _pass_on(self, graph: ir.Graph, call: ir.Node, old: ir.Value, new: ir.Value | None) -> None:
        """Make the readers of an output of the call read the body's output; a graph output keeps its name and type."""
        if not old.is_graph_output():
            self._check(_replace(old, new))
            return
        if new is None:
            raise ModelLoadError(
                f'the call of {call.op_type} "{call.name}" gives the output "{old.name}" from an input that it leaves '
                "out; export the model again."
            )
        output = ir.Value(name=old.name, type=old.type, shape=old.shape)
        graph.insert_before(call, ir.Node("", "Identity", [new], outputs=[output], name=f"{old.name}/call"))
        old.replace_all_uses_with(output, replace_graph_outputs=True)

    def _check(self, changed: Sequence[ir.Node]) -> None:
        """Check nodes whose attributes or inputs came from a call, as the nodes of a file are checked."""
        for node in changed:
            if node.op_identifier() not in self._functions:
                check_node(ir.to_proto(node), self._imports, self._name)

    def _name_apart(self, body: ir.Graph) -> None:
        for graph in (body, *body.subgraphs()):
            for node in graph:
                node.name = self._names.take(node.name or node.op_type)
            for value in _values_of(graph):
                if value.name and value.const_value is None:  # a tensor's name belongs to the source, too
                    value.name = self._names.take(value.name)


def _values_of(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from (*graph.inputs, *graph.initializers.values())
    for node in graph:
        yield from node.outputs


def _outputs(body: ir.Graph, arguments: Sequence[ir.Value | None]) -> list[ir.Value | None]:
    """The outputs of the body; a function may return one of its inputs unchanged."""
    given = dict(zip(body.inputs, arguments, strict=True))
    return [given.get(value, value) for value in body.outputs]


def _replace(value: ir.Value, other: ir.Value | None) -> list[ir.Node]:
    """Make the readers of `value` read `other`; returns the nodes that have one input less."""
    if other is not None:
        value.replace_all_uses_with(other)
        return []
    uses = list(value.uses())
    for node, position in uses:
        node.replace_input_with(position, None)
    return [node for node, _ in uses]


def _set_attributes(body: ir.Graph, given: Mapping[str, ir.Attr]) -> list[ir.Node]:
    """Replace references to attributes of the function by the call's; an attribute that the call lacks has no value.

    Returns the changed nodes, whose attributes are not checked yet.
    """
    changed: dict[ir.Node, None] = {}
    for node in ir.traversal.RecursiveGraphIterator(body):
        for key, attribute in list(node.attributes.items()):
            if not attribute.is_ref():
                continue
            changed[node] = None
            value = given.get(str(attribute.ref_attr_name))
            if value is None:
                del node.attributes[key]
            elif value.type in _GRAPHS:
                raise UnsupportedModelError(
                    f'node {node.op_type} "{node.name}" of a function takes its graph {key} from the call, expected '
                    "graphs in the function itself; export the model without functions."
                )
            else:
                node.attributes[key] = ir.Attr(key, value.type, value.value)
    return list(changed)


# -- versions ------------------------------------------------------------------------------------------------------


def _harmonize_opsets(model: ir.Model, name: str) -> None:
    """Refuse a function with an op that differs in the model's opset; exporters write functions for an older opset."""
    imports = model.graph.opset_imports
    for function in model.functions.values():
        for domain, version in function.opset_imports.items():
            wanted = imports.setdefault(domain, version)
            if wanted == version:
                continue
            for node in ir.traversal.RecursiveGraphIterator(function):
                if node.domain == domain and _since(node, version) != _since(node, wanted):
                    raise UnsupportedModelError(
                        f"{name}: function {function.domain}::{function.name} uses {node.op_type} of "
                        f"{domain or 'ai.onnx'} opset {version}, the model's opset is {wanted}, and the op has changed "
                        "in between; export the model with one opset, or convert it with onnx.version_converter."
                    )


def _since(node: ir.Node, version: int) -> int | None:
    """The version in which a node's op got the definition that it has in `version`; None for an unknown op."""
    try:
        return int(onnx.defs.get_schema(node.op_type, version, node.domain).since_version)
    except onnx.defs.SchemaError:
        return None
