"""Bring any exporter's graph into the form that the analysis expects: plain nodes, initializers, no aliases."""

from __future__ import annotations

import itertools

import onnx_ir as ir
from onnx_ir.passes import PassError
from onnx_ir.passes import common as passes

from furiosa_llm.builder.decompose import decompose
from furiosa_llm.builder.errors import ModelLoadError, UnsupportedModelError
from furiosa_llm.builder.load import Source
from furiosa_llm.builder.program import ORIGINAL_NAME
from furiosa_llm.builder.sequences import replace_sequences
from furiosa_llm.builder.unsupported_ops import refuse_unsupported_ops

_OLDEST_OPSET = 7
"""Before it, elementwise ops aligned dimensions by an attribute."""
_RANDOM = frozenset(
    ("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike")
)


def normalize(source: Source) -> ir.Model:
    """A normalised copy of the source graph that shares its weights.

    Functions are inlined, Constant nodes become initializers, Identity aliases and dead code go, nodes are in
    topological order, and every use of a vector initializer has a value of its own (exporters store equal vectors once,
    and unrelated dimensions must not be tied together by that). Raises ModelLoadError for a graph that is damaged and
    UnsupportedModelError for one that cannot be split.
    """
    try:
        source.model.graph.sort()  # a clone needs its nodes in order, and a cycle has none
    except ValueError as error:
        raise ModelLoadError(f"{source.path.name} is not a valid graph: {error}; export the model again.") from error
    _check_values(source.model, source)
    model = source.model.clone()
    _check_opset(model, source)
    try:
        passes.RemoveInitializersFromInputsPass()(model)
        _inline_constant_ifs(model)
        passes.InlinePass()(model)
        _inline_constant_ifs(model)
        _refuse_subgraphs(model, source)
        refuse_unsupported_ops(model, source)
        decompose(model.graph)
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        replace_sequences(model.graph, source.path.name)
        _compute_outputs(model.graph)
        _remove_identities(model.graph)
        passes.RemoveUnusedNodesPass()(model)
        passes.TopologicalSortPass()(model)
    except (PassError, ValueError) as error:
        raise ModelLoadError(
            f"{source.path.name} is not a valid graph: {_root_cause(error)}; export the model again."
        ) from error
    _refuse_random_ops(model, source)
    _separate_vector_uses(model.graph)
    return model


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).rstrip(".")


def _check_opset(model: ir.Model, source: Source) -> None:
    opset = model.graph.opset_imports.get("", _OLDEST_OPSET)
    if opset < _OLDEST_OPSET:
        raise UnsupportedModelError(
            f"{source.path.name} uses opset {opset}, expected {_OLDEST_OPSET} or later; "
            "export the model again, or convert it with onnx.version_converter."
        )


# -- branches ----------------------------------------------------------------------------------------------------


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
            branch.initializers.pop(str(value.name))
            value.replace_all_uses_with(_copy(model.graph, value, str(value.name)), replace_graph_outputs=True)
        branch.remove(inner)
        model.graph.insert_before(node, inner)
        for old, new in zip(node.outputs, outputs, strict=True):
            # The branch's value may be one that the graph has anyway, and the output keeps its name.
            alias = ir.Node("", "Identity", [new], name=f"{old.name}/branch")
            alias.outputs[0].name = old.name
            alias.outputs[0].type, alias.outputs[0].shape = old.type, old.shape
            model.graph.insert_before(node, alias)
            old.replace_all_uses_with(alias.outputs[0], replace_graph_outputs=True)
        model.graph.remove(node, safe=True)


def _copy(graph: ir.Graph, initializer: ir.Value, name: str) -> ir.Value:
    """A new initializer of `graph` with the same tensor; renaming a value would rename the source's tensor, too."""
    names = (name if number == 0 else f"{name}/{number}" for number in itertools.count())
    free = next(candidate for candidate in names if candidate not in graph.initializers)
    tensor = initializer.const_value
    copy = ir.Value(name=free, shape=initializer.shape, type=initializer.type, const_value=tensor)
    copy.meta[ORIGINAL_NAME] = initializer.meta.get(ORIGINAL_NAME, initializer.name)
    graph.register_initializer(copy)
    return copy


def _constant_condition(node: ir.Node) -> bool | None:
    condition = node.inputs[0]
    if condition is None or condition.is_graph_input():
        return None
    tensor = ir.convenience.get_const_tensor(condition)
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


# -- aliases -----------------------------------------------------------------------------------------------------


def _compute_outputs(graph: ir.Graph) -> None:
    """Let a node give every graph output that is an initializer."""
    for position, value in enumerate(graph.outputs):
        if not value.is_initializer():
            continue
        name = str(value.name)
        copy = _copy(graph, value, f"{name}/initializer")
        output = ir.Value(name=name, shape=value.shape, type=value.type)
        graph.append(ir.Node("", "Identity", [copy], outputs=[output], name=f"{name}/output"))
        graph.outputs[position] = output
        value.replace_all_uses_with(copy)
        graph.initializers.pop(name)


def _remove_identities(graph: ir.Graph) -> None:
    """Remove every Identity but those between two values that both have a name to keep."""
    for node in list(graph):
        if node.op_type != "Identity" or node.domain or node.inputs[0] is None:
            continue
        before, after = node.inputs[0], node.outputs[0]
        if after.is_graph_output():
            if before.is_graph_output() or before.is_graph_input() or before.is_initializer():
                continue
            name = after.name
            after.replace_all_uses_with(before, replace_graph_outputs=True)
            graph.remove(node, safe=True)
            before.name = name
        else:
            after.replace_all_uses_with(before)
            graph.remove(node, safe=True)


# -- checks ------------------------------------------------------------------------------------------------------


def _check_values(model: ir.Model, source: Source) -> None:
    """Every node input must come from somewhere, and every graph input and output must have a type and its own name."""
    known = set(model.graph.inputs) | set(model.graph.initializers.values())
    for node in model.graph:
        for value in node.inputs:
            if value is not None and value not in known:
                raise ModelLoadError(
                    f'{source.path.name}: node {node.op_type} "{node.name}" reads "{value.name}", '
                    "which no node, input or initializer gives; the graph is damaged, export it again."
                )
        known.update(node.outputs)
    for value in model.graph.outputs:
        if value not in known:
            raise ModelLoadError(
                f'{source.path.name}: no node gives the output "{value.name}"; the graph is damaged, export it again.'
            )
        if model.graph.outputs.count(value) > 1:
            raise ModelLoadError(
                f'{source.path.name} lists the output "{value.name}" twice; remove one of them, or export it again.'
            )
    for value in (*model.graph.inputs, *model.graph.outputs):
        if not isinstance(value.type, ir.TensorType):
            raise UnsupportedModelError(
                f'{source.path.name}: "{value.name}" has type {value.type}, expected a tensor; '
                "sequences and optionals cannot cross the boundary of a model that is split."
            )


def _refuse_random_ops(model: ir.Model, source: Source) -> None:
    for node in model.graph:
        trains = node.op_type == "Dropout" and len(node.inputs) > 2 and not _is_constant_false(node.inputs[2])
        if not node.domain and (node.op_type in _RANDOM or trains):
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
            node.replace_input_with(index, _copy(graph, value, f"{value.name}/use{number}"))
