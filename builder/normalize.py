"""Bring any exporter's graph into the form that the analysis expects: plain nodes, initializers, no aliases."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import PassError
from onnx_ir.passes import common as passes

from furiosa_llm.builder.errors import ModelLoadError, UnsupportedModelError
from furiosa_llm.builder.load import Source


def normalize(source: Source) -> ir.Model:
    """A normalised copy of the source graph that shares its weights.

    Functions are inlined, Constant nodes become initializers, Identity aliases and dead code go, nodes are in
    topological order, and every use of a vector initializer has a value of its own (exporters store equal vectors once,
    and unrelated dimensions must not be tied together by that).
    """
    model = source.model.clone()
    _inline_constant_ifs(model)
    try:
        passes.InlinePass()(model)
        _inline_constant_ifs(model)
        _refuse_subgraphs(model, source)
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        passes.IdentityEliminationPass()(model)
        passes.RemoveUnusedNodesPass()(model)
        passes.TopologicalSortPass()(model)
    except (PassError, ValueError) as error:
        raise ModelLoadError(f"{source.path.name} is not a valid graph: {_root_cause(error)}") from error
    _check_values(model, source)
    _separate_vector_uses(model.graph)
    return model


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error)


def _inline_constant_ifs(model: ir.Model) -> None:
    """Replace every If whose condition is a constant by the branch that is taken."""
    while True:
        node = next((n for n in model.graph if n.op_type == "If" and _constant_condition(n) is not None), None)
        if node is None:
            return
        branch = node.attributes["then_branch" if _constant_condition(node) else "else_branch"].as_graph()
        outputs = list(branch.outputs)
        inner = list(branch)
        for value in list(branch.initializers.values()):
            branch.initializers.pop(value.name)
            model.graph.initializers[value.name] = value
        branch.remove(inner)
        model.graph.insert_before(node, inner)
        for old, new in zip(node.outputs, outputs, strict=True):
            old.replace_all_uses_with(new, replace_graph_outputs=True)
        model.graph.remove(node, safe=True)


def _constant_condition(node: ir.Node) -> bool | None:
    condition = node.inputs[0]
    tensor = condition.const_value if condition is not None and not condition.is_graph_input() else None
    return None if tensor is None else bool(tensor.numpy().item())


def _refuse_subgraphs(model: ir.Model, source: Source) -> None:
    for node in model.graph:
        if not any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
            continue
        message = f'{source.path.name}: node {node.op_type} "{node.name}" has branches that cannot be inlined'
        if node.op_type == "If":
            siblings = sorted(p.name for p in source.path.parent.glob("*.onnx") if p.name != source.path.name)
            message += " (its condition is not a constant)"
            remedy = "export the branches as separate models, for instance the prefill and the with-past decoder"
            if siblings:
                remedy = f"build one of the files beside it instead ({', '.join(siblings)}), or {remedy}"
        else:
            remedy = "export the model with its loops unrolled"
        raise UnsupportedModelError(f"{message}; {remedy}.")


def _check_values(model: ir.Model, source: Source) -> None:
    """Every node input must come from somewhere, and every graph input and output must have a type."""
    known = set(model.graph.inputs) | set(model.graph.initializers.values())
    for node in model.graph:
        for value in node.inputs:
            if value is not None and value not in known:
                raise ModelLoadError(
                    f'{source.path.name}: node {node.op_type} "{node.name}" reads "{value.name}", '
                    "which no node, input or initializer gives; the graph is damaged, export it again."
                )
        known.update(node.outputs)
    for value in (*model.graph.inputs, *model.graph.outputs):
        if not isinstance(value.type, ir.TensorType):
            raise UnsupportedModelError(
                f'{source.path.name}: "{value.name}" has type {value.type}, expected a tensor; '
                "sequences and optionals cannot cross the boundary of a model that is split."
            )


def _separate_vector_uses(graph: ir.Graph) -> None:
    for value in list(graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or len(tensor.shape) != 1 or tensor.size <= 1:
            continue
        for number, (node, index) in enumerate(list(value.uses())[1:], start=1):
            clone = ir.Value(name=f"{value.name}/use{number}", shape=value.shape, type=value.type, const_value=tensor)
            graph.register_initializer(clone)
            node.replace_input_with(index, clone)
