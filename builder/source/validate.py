"""Check the fields of an ONNX file before anything is built from them: versions, names, types, functions.

Later stages take for granted what is checked here. Nodes are compared with their operators' definitions in
`furiosa_llm.builder.source.validate_nodes`, tensors with their data in `furiosa_llm.builder.source.validate_tensors`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import onnx
from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

from furiosa_llm.builder.errors import ModelLoadError, UnsupportedModelError
from furiosa_llm.builder.source.protobuf_scan import LeftOut
from furiosa_llm.builder.source.validate_nodes import check_node, is_operator
from furiosa_llm.builder.source.validate_tensors import MAX_ELEMENTS, check_tensor, check_text, dtype_name
from furiosa_llm.runtime.artifact.dtypes import DTYPES
from furiosa_llm.runtime.artifact.graphs import all_graphs, all_nodes

MAX_INLINED_NODES = 100_000
"""Functions that call functions may double the nodes with every level, so that a small file stands for more nodes than
memory holds."""
_OLDEST_OPSET = 7
"""Before this opset, elementwise ops aligned dimensions by an attribute."""
_NEWEST = {"ai.onnx.ml": 5, "ai.onnx.preview.training": 1, "ai.onnx.training": 1, "com.microsoft": 1}
"""Versions of other domains: onnxruntime loads no model that imports a later one, even if no node is of the domain."""
_OLDEST_IR_VERSION = 3
"""Before this version, models did not say which opset they use."""

FunctionKey = tuple[str, str, str]


def validate(proto: ModelProto, name: str, left_out: Mapping[int, LeftOut]) -> None:
    """Raise ModelLoadError if the model in the file `name` is damaged, UnsupportedModelError if it is not supported.

    `left_out` is what was left out of the graph's initializers, by their positions.
    """
    opsets = _opsets(proto, name)
    functions = _functions(proto, opsets, name)
    for node in all_nodes(proto.graph.node):
        _check_node(node, opsets, functions, name)
        for attribute in node.attribute:
            if attribute.ref_attr_name:
                raise ModelLoadError(
                    f'{name}: node {node.op_type} "{node.name}" has the attribute {attribute.name} of a function, but '
                    "is in none; the file is damaged, export the model again."
                )
    _check_names(proto.graph, name, left_out)
    for graph in all_graphs(proto.graph.node):
        _check_names(graph, name, {})
    for value in (*proto.graph.input, *proto.graph.output):
        _check_value(value, name)
    for function in functions.values():
        own = _function_opsets(function, name)
        for node in all_nodes(function.node):
            _check_node(node, own, functions, name)
        _check_function(function, name)
    _check_expansion(proto, functions, name)


def drop_fallbacks(proto: ModelProto) -> None:
    """Remove functions that define an op of onnxruntime's own for runtimes that lack the op.

    Onnxruntime runs its own op, whatever the function says.
    """
    opsets = {_domain(entry.domain): entry.version for entry in proto.opset_import}
    for function in list(proto.functions):
        domain = _domain(function.domain)
        if domain and domain in opsets and is_operator(function.name, domain, opsets[domain]):
            proto.functions.remove(function)


def _check_node(
    node: NodeProto, opsets: dict[str, int], functions: dict[FunctionKey, FunctionProto], name: str
) -> None:
    function = functions.get(_key(node))
    check_node(node, opsets, name, call=function)
    for attribute in node.attribute:
        if attribute.ref_attr_name:
            continue
        tensors = [attribute.t] if attribute.type == AttributeProto.TENSOR else attribute.tensors
        for tensor in tensors:
            where = f'{name}: attribute {attribute.name} of node {node.op_type} "{node.name}"'
            check_tensor(tensor, where, any_type=True)


# -- versions ------------------------------------------------------------------------------------------------------


def _opsets(proto: ModelProto, name: str) -> dict[str, int]:
    if not _OLDEST_IR_VERSION <= proto.ir_version <= onnx.IR_VERSION:
        raise UnsupportedModelError(
            f"{name} has the ONNX IR version {proto.ir_version}, expected {_OLDEST_IR_VERSION} to {onnx.IR_VERSION}; "
            "export the model again with a version of ONNX in between."
        )
    opsets = _imports(proto.opset_import, name)
    if "" not in opsets:
        raise ModelLoadError(
            f"{name} does not say which version of the standard ops it uses (no opset_import of the default domain); "
            "the file is damaged, export the model again."
        )
    _check_opset(opsets[""], name)
    return opsets


def _imports(entries: Iterable[onnx.OperatorSetIdProto], where: str) -> dict[str, int]:
    opsets: dict[str, int] = {}
    for entry in entries:
        domain = _domain(entry.domain)
        version = opsets.setdefault(domain, entry.version)
        if version != entry.version:
            raise ModelLoadError(
                f'{where} imports the ops "{domain or "ai.onnx"}" in the versions {version} and {entry.version}, '
                "expected one version of each domain; export the model again."
            )
        if not 0 < version < 2**31:
            raise ModelLoadError(
                f'{where} imports version {version} of the ops "{domain or "ai.onnx"}", expected 1 to {2**31 - 1}; '
                "the file is damaged, export the model again."
            )
        if version > _NEWEST.get(domain, version):
            raise UnsupportedModelError(
                f'{where} imports version {version} of the ops "{domain}", expected at most {_NEWEST[domain]}, the '
                "newest that onnxruntime has; export the model again."
            )
    return opsets


def _check_opset(version: int, where: str) -> None:
    newest = onnx.defs.onnx_opset_version()
    if not _OLDEST_OPSET <= version <= newest:
        raise UnsupportedModelError(
            f"{where} uses opset {version}, expected {_OLDEST_OPSET} or later and at most {newest}; "
            "export the model again, or convert it with onnx.version_converter."
        )


def _domain(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain


# -- names ---------------------------------------------------------------------------------------------------------


def _check_names(graph: GraphProto, name: str, left_out: Mapping[int, LeftOut]) -> None:
    """Refuse a graph unless each of its values has one source and a name of its own."""
    if graph.sparse_initializer:
        raise UnsupportedModelError(
            f'{name}: graph "{graph.name}" has sparse initializers, expected dense ones; '
            "convert them (onnx.reference or numpy can) and save the model again."
        )
    check_text(f"{name}: a graph", graph.name)
    for index, tensor in enumerate(graph.initializer):
        check_tensor(tensor, f'{name}: initializer "{tensor.name}"', left_out=left_out.get(index))
    inputs = _distinct("input", [value.name for value in graph.input], name)
    initializers = _distinct("initializer", [tensor.name for tensor in graph.initializer], name)
    check_text(f"{name}: a value", *(value.name for value in (*graph.value_info, *graph.output)))
    seen = {**dict.fromkeys(inputs, "an input"), **dict.fromkeys(initializers, "an initializer")}
    for node in graph.node:
        own = f'{node.op_type} "{node.name}"'
        for value in node.output:
            if value and value in seen:
                raise ModelLoadError(
                    f'{name}: node {own} gives "{value}", which is {seen[value]} already; '
                    "each value must have one source, export the model again."
                )
            seen[value] = f"an output of node {own}"


def _distinct(kind: str, values: list[str], name: str) -> set[str]:
    check_text(f"{name}: an {kind}", *values)
    found: set[str] = set()
    for value in values:
        if not value:
            raise ModelLoadError(f"{name} has an {kind} without a name; the file is damaged, export the model again.")
        if value in found:
            raise ModelLoadError(f'{name} lists the {kind} "{value}" twice; remove one of them, or export it again.')
        found.add(value)
    return found


# -- types ---------------------------------------------------------------------------------------------------------


def _check_value(value: ValueInfoProto, name: str) -> None:
    """Check an input or output of the model; types other than tensors are refused later, when the graph is known."""
    check_text(f"{name}: an input or output", value.name)
    where = f'{name}: "{value.name}"'
    if not value.type.HasField("tensor_type"):
        return
    tensor = value.type.tensor_type
    if tensor.elem_type == TensorProto.UNDEFINED:
        raise ModelLoadError(f"{where} has no element type; the file is damaged, export the model again.")
    if dtype_name(tensor.elem_type) not in DTYPES:
        raise UnsupportedModelError(
            f"{where} has elements of type {dtype_name(tensor.elem_type)}, expected one of {', '.join(DTYPES)}; "
            "convert it outside of the model."
        )
    elements = 1
    for dim in tensor.shape.dim:
        check_text(where, dim.dim_param)
        if dim.HasField("dim_value"):
            elements *= max(dim.dim_value, 1)
            if dim.dim_value < 0:
                raise ModelLoadError(
                    f"{where} has a dimension of {dim.dim_value}, expected 0 or more; export it again."
                )
    if elements > MAX_ELEMENTS:
        raise ModelLoadError(
            f"{where} has {elements} elements, expected at most {MAX_ELEMENTS}; the file is damaged, export it again."
        )


# -- functions -----------------------------------------------------------------------------------------------------


def _key(node: NodeProto) -> FunctionKey:
    return _domain(node.domain), node.op_type, node.overload


def _functions(proto: ModelProto, opsets: dict[str, int], name: str) -> dict[FunctionKey, FunctionProto]:
    functions: dict[FunctionKey, FunctionProto] = {}
    for function in proto.functions:
        key = (_domain(function.domain), function.name, function.overload)
        check_text(f"{name}: a function", *key)
        if key in functions:
            raise ModelLoadError(
                f"{name} defines the function {function.domain}::{function.name} twice; export it again."
            )
        if is_operator(function.name, key[0], opsets.get(key[0], 1)):
            raise UnsupportedModelError(
                f"{name} defines the function {key[0] or 'ai.onnx'}::{function.name}, which is an operator, too; "
                "runtimes disagree about which of the two is meant: rename the function or remove it."
            )
        functions[key] = function
    return functions


def _function_opsets(function: FunctionProto, name: str) -> dict[str, int]:
    where = f"{name}: function {function.domain}::{function.name}"
    opsets = _imports(function.opset_import, where)
    if "" in opsets:
        _check_opset(opsets[""], where)
    missing = {_domain(node.domain) for node in all_nodes(function.node)} - opsets.keys()
    if missing:
        raise ModelLoadError(
            f"{where} uses ops of {sorted(domain or 'ai.onnx' for domain in missing)} without importing them; "
            "the file is damaged, export the model again."
        )
    return opsets


def _check_function(function: FunctionProto, name: str) -> None:
    where = f"{name}: function {function.domain}::{function.name}"
    for what, names in (("input", list(function.input)), ("output", list(function.output))):
        if len(set(names)) != len(names) or "" in names:
            raise ModelLoadError(
                f"{where} has {what}s {names!r:.200}, expected distinct names; export the model again."
            )
    seen = set(function.input)
    for node in function.node:
        for value in node.output:
            if value and value in seen:
                raise ModelLoadError(
                    f'{where} gives "{value}" twice; each value must have one source, export it again.'
                )
            seen.add(value)
    for value in function.output:
        if value not in seen:
            raise ModelLoadError(f'{where}: no node gives the output "{value}"; export the model again.')
    for graph in all_graphs(function.node):
        _check_names(graph, where, {})


def _check_expansion(proto: ModelProto, functions: dict[FunctionKey, FunctionProto], name: str) -> None:
    """Refuse functions that call themselves, and calls that together stand for more nodes than memory holds."""
    calls = {key: [_key(n) for n in all_nodes(f.node) if _key(n) in functions] for key, f in functions.items()}
    sizes: dict[FunctionKey, int] = {}
    for root in functions:
        path, entered = [(root, iter(calls[root]))], {root}
        while path and root not in sizes:
            key, rest = path[-1]
            following = next((callee for callee in rest if callee not in sizes), None)
            if following is None:
                sizes[key] = sum(1 for _ in all_nodes(functions[key].node)) + sum(
                    sizes[callee] for callee in calls[key]
                )
                path.pop()
                entered.remove(key)
            elif following in entered:
                raise ModelLoadError(
                    f"{name}: function {following[0]}::{following[1]} calls itself, a cycle that never ends; "
                    "export the model without recursion."
                )
            else:
                path.append((following, iter(calls[following])))
                entered.add(following)
    total = sum(sizes.get(_key(node), 0) for node in all_nodes(proto.graph.node))
    if total > MAX_INLINED_NODES:
        raise UnsupportedModelError(
            f"{name} has {total} nodes in functions once these are inlined, expected at most {MAX_INLINED_NODES}; "
            "export the model without functions that call each other many times."
        )
