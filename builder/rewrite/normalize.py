"""Bring any exporter's graph into the form that the analysis expects: plain nodes, initializers, no aliases."""

from __future__ import annotations

from collections import Counter

import onnx_ir as ir
from onnx_ir.passes import InvariantError, PassError
from onnx_ir.passes import common as passes

from furiosa_llm.builder.errors import ModelLoadError, UnsupportedModelError
from furiosa_llm.builder.rewrite.constants import lift_constants
from furiosa_llm.builder.rewrite.control_flow import add_initializer, close, take_constant_branches
from furiosa_llm.builder.rewrite.dead_code import remove_unused
from furiosa_llm.builder.rewrite.decompose import decompose
from furiosa_llm.builder.rewrite.functions import inline_functions
from furiosa_llm.builder.rewrite.sequences import replace_sequences
from furiosa_llm.builder.rewrite.unsupported_ops import refuse_unsupported_ops
from furiosa_llm.builder.rules import op_of
from furiosa_llm.builder.shapes.closures import graphs_of, nodes_within
from furiosa_llm.builder.shapes.control_flow import SIBLINGS
from furiosa_llm.builder.source.load import Source, root_cause

_OVERRIDABLE = 4
"""The IR version since which initializers need not be inputs."""


def normalize(source: Source) -> ir.Model:
    """A normalised copy of the source graph that shares its weights.

    Functions are inlined, Constant nodes become initializers, branches and bodies are closed over what they read,
    Identity, idle Dropout and dead code go, nodes are in topological order, and every use of a vector initializer has
    a value of its own (exporters store equal vectors once, and unrelated dimensions must not be tied together by that).
    Raises ModelLoadError for a graph that is damaged and UnsupportedModelError for one that cannot be split.
    """
    try:
        for graph in _roots(source.model):
            graph.sort()  # a clone needs its nodes in topological order, which a cycle does not have
    except ValueError as error:
        raise ModelLoadError(f"{source.path.name} is not a valid graph: {error}; export the model again.") from error
    _check_values(source.model, source)
    model = source.model.clone()
    model.graph.meta[SIBLINGS] = sorted(p.name for p in source.path.parent.glob("*.onnx") if p != source.path)
    try:
        _settle_defaults(model)
        inline_functions(model, source.path.name)
        refuse_unsupported_ops(model, source)
        decompose(model.graph)
        lift_constants(model)
        replace_sequences(model.graph, source.path.name)
        close(model.graph)
        take_constant_branches(model.graph)
        _compute_outputs(model.graph)
        _remove_identities(model.graph)
        passes.TopologicalSortPass()(model)
        remove_unused(model)
    except (PassError, InvariantError, ValueError) as error:
        raise ModelLoadError(
            f"{source.path.name} is not a valid graph: {root_cause(error)}; export the model again."
        ) from error
    _refuse_random_ops(model, source)
    _separate_vector_uses(model.graph)
    return model


# -- defaults ----------------------------------------------------------------------------------------------------


def _settle_defaults(model: ir.Model) -> None:
    """Settle inputs that are also initializers: constants in files that list all of these, else inputs with a default.

    Early versions of ONNX listed every initializer among the inputs; later ones list those that a caller may replace.
    """
    graph = model.graph
    listed = [value for value in graph.inputs if value.is_initializer()]
    if model.ir_version < _OVERRIDABLE or 2 * len(listed) > len(graph.initializers):
        passes.RemoveInitializersFromInputsPass()(model)
        return
    for value in listed:
        graph.initializers.pop(str(value.name))
        value.const_value = None


# -- aliases -----------------------------------------------------------------------------------------------------


def _compute_outputs(graph: ir.Graph) -> None:
    """Make a node give every graph output that is an initializer."""
    for position, value in enumerate(graph.outputs):
        if not value.is_initializer():
            continue
        name = str(value.name)
        copy = add_initializer(graph, value, f"{name}/initializer")
        output = ir.Value(name=name, shape=value.shape, type=value.type)
        graph.append(ir.Node("", "Identity", [copy], outputs=[output], name=f"{name}/output"))
        graph.outputs[position] = output
        value.replace_all_uses_with(copy)
        graph.initializers.pop(name)


def _remove_identities(graph: ir.Graph) -> None:
    """Remove every Identity and every idle Dropout, except between two values that both have a name to keep."""
    removed = []
    for node in graph:
        if not _is_alias(node) or node.inputs[0] is None:
            continue
        before, after = node.inputs[0], node.outputs[0]
        if after.is_graph_output():
            if before.is_graph_output() or before.is_graph_input() or before.is_initializer():
                continue
            name = after.name
            after.replace_all_uses_with(before, replace_graph_outputs=True)
            after.name = None  # the name is taken over
            before.name = name
        else:
            after.replace_all_uses_with(before)
        removed.append(node)
    graph.remove(removed, safe=True)


def _is_alias(node: ir.Node) -> bool:
    """Whether `node` gives its first input, and nothing else that is read."""
    if node.domain or node.op_type != "Dropout":
        return not node.domain and node.op_type == "Identity"
    return not _trains(node) and not any(mask.uses() or mask.is_graph_output() for mask in node.outputs[1:])


def _trains(node: ir.Node) -> bool:
    """Whether `node` is a Dropout that may drop something."""
    return node.op_type == "Dropout" and len(node.inputs) > 2 and not _is_constant_false(node.inputs[2])


# -- checks ------------------------------------------------------------------------------------------------------


def _roots(model: ir.Model) -> list[ir.Graph]:
    """The main graph and the graphs of the functions."""
    return [model.graph, *(function.graph for function in model.functions.values())]


def _check_values(model: ir.Model, source: Source) -> None:
    """Check that every node input has a source, and that every graph input and output has a type and its own name."""
    for graph in _roots(model):
        _check_scope(graph, set(), source)
    listed = Counter(model.graph.outputs)
    for value in listed:
        if value.is_graph_input():
            raise UnsupportedModelError(
                f'{source.path.name} gives its input "{value.name}" back as an output, expected outputs that a node '
                "gives; remove it from the outputs, its caller has it."
            )
        if listed[value] > 1:
            raise ModelLoadError(
                f'{source.path.name} lists the output "{value.name}" twice; remove one of them, or export it again.'
            )
    for value in (*model.graph.inputs, *model.graph.outputs):
        if not isinstance(value.type, ir.TensorType):
            raise UnsupportedModelError(
                f'{source.path.name}: "{value.name}" has type {value.type}, expected a tensor; '
                "sequences and optionals cannot cross the boundary of a model that is split, export it with tensors."
            )


def _check_scope(graph: ir.Graph, known: set[ir.Value], source: Source) -> None:
    """Check a graph that may read the values that are `known` around it, and the graphs in it."""
    own = {*graph.inputs, *graph.initializers.values()}
    known |= own
    for node in graph:
        for value in node.inputs:
            if value is not None and value not in known:
                raise ModelLoadError(
                    f'{source.path.name}: node {node.op_type} "{node.name}" reads "{value.name}", '
                    "which no node, input or initializer gives; the graph is damaged, export it again."
                )
        for inner in graphs_of(node):
            _check_scope(inner, known, source)
        known.update(node.outputs)
        own.update(node.outputs)
    for value in graph.outputs:
        if value not in known:
            raise ModelLoadError(
                f'{source.path.name}: no node gives the output "{value.name}"; the graph is damaged, export it again.'
            )
    known -= own


def _refuse_random_ops(model: ir.Model, source: Source) -> None:
    for node in (inner for outer in model.graph for inner in (outer, *nodes_within(outer))):
        entry = op_of(node)
        if (entry is not None and entry.random) or (not node.domain and _trains(node)):
            raise UnsupportedModelError(
                f'{source.path.name}: node {node.op_type} "{node.name}" draws random numbers, which every rank would '
                "draw anew; export the model without sampling, in inference mode."
            )


def _is_constant_false(value: ir.Value | None) -> bool:
    if value is None:
        return True
    tensor = value.const_value if value.is_initializer() else None
    return tensor is not None and not tensor.numpy().any()


# -- vectors -----------------------------------------------------------------------------------------------------


def _separate_vector_uses(graph: ir.Graph) -> None:
    for value in list(graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or sum(size > 1 for size in tensor.shape.numpy()) != 1:
            continue
        for number, (node, index) in enumerate(list(value.uses())[1:], start=1):
            node.replace_input_with(index, add_initializer(graph, value, f"{value.name}/use{number}"))
