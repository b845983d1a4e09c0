"""Compare a node with its operator's definition: the number of inputs and outputs, names and types of attributes."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NoReturn

import onnx
from onnx import AttributeProto, FunctionProto, NodeProto, TensorProto
from onnx.defs import OpSchema

from furiosa_llm.builder.errors import ModelLoadError, UnsupportedModelError
from furiosa_llm.builder.rules import OPS
from furiosa_llm.builder.rules.control_flow import CLOSURE_DOMAIN
from furiosa_llm.builder.rules.operands import Definition
from furiosa_llm.builder.source.validate_tensors import check_text
from furiosa_llm.runtime.artifact.checks.model import VALUE_FIELDS
from furiosa_llm.runtime.artifact.graphs import COLLECTIVE_DOMAIN

MAX_INPUTS = 4096
"""Of one node: to replace one of them takes as long as there are inputs, and each may be replaced."""
_FLAGS = frozenset(
    ("allowzero", "ceil_mode", "exclusive", "fmod", "is_causal", "keepdims", "largest", "noop_with_empty_axes",
     "reverse", "saturate", "sorted", "transA", "transB", "upper")
)  # fmt: skip
"""Integer attributes that mean yes or no; kernels disagree about the meaning of other numbers."""
_ELEMENT_TYPES = frozenset(("dtype", "output_dtype", "to"))
_TYPES: Mapping[object, int] = {
    getattr(OpSchema.AttrType, name): number
    for name, number in AttributeProto.AttributeType.items()
    if hasattr(OpSchema.AttrType, name)
}
"""An attribute's type in an operator's definition -> its type in a file."""
_PAYLOADS = {
    AttributeProto.TENSOR: "t",
    AttributeProto.GRAPH: "g",
    AttributeProto.SPARSE_TENSOR: "sparse_tensor",
    AttributeProto.TYPE_PROTO: "tp",
}


_INTEGERS = frozenset(
    ("accuracy_level", "axis", "bits", "block_size", "do_rotary", "gather_axis", "interleaved", "k", "kv_num_heads",
     "local_window_size", "num_heads", "quantize_axis", "rotary_embedding_dim", "rotary_interleaved",
     "swiglu_fusion", "transA", "transB", "transBatchA", "transBatchB")
)  # fmt: skip
"""Attributes that are integers in all of onnxruntime's own ops."""


def check_node(node: NodeProto, opsets: Mapping[str, int], file: str, *, call: FunctionProto | None = None) -> None:
    """Raise ModelLoadError if `node` does not fit its operator, or the function that it calls.

    UnsupportedModelError if it has too many inputs.
    """
    where = f"{file}: node {node.op_type!r:.80} {node.name!r:.200}"
    check_text(where, node.name, node.op_type, node.domain, node.overload, *node.input, *node.output)
    where = f'{file}: node {node.op_type} "{node.name}"'
    if not node.op_type:
        _fail(where, "has no op_type", "the name of an operator")
    domain = "" if node.domain == "ai.onnx" else node.domain
    if domain.partition(".")[0] == COLLECTIVE_DOMAIN:
        _fail(where, f'is of the domain "{domain}", which programs of artifacts use', "a model that is not split yet")
    if domain not in opsets:
        _fail(where, f'is of the domain "{domain or "ai.onnx"}", of which no version is imported', "an opset_import")
    if len(node.input) > MAX_INPUTS:
        raise UnsupportedModelError(
            f"{where} has {len(node.input)} inputs, expected at most {MAX_INPUTS}; combine them in several nodes, and "
            "the results of these in one."
        )
    _check_attributes(node, where)
    if call is not None:
        _check_count(where, "inputs", len(node.input), range(len(call.input) + 1))
        _check_count(where, "outputs", len(node.output), range(len(call.output) + 1))
        return
    definition = _definition(node.op_type, domain, opsets[domain])
    if definition is not None:
        _check_definition(node, definition, where)
    if not domain:
        _check_graphs(node, where)


def is_operator(op_type: str, domain: str, version: int) -> bool:
    """Whether this package knows a definition of an op, which a function of the same name would replace."""
    return _definition(op_type, domain, version) is not None


def _check_attributes(node: NodeProto, where: str) -> None:
    seen: set[str] = set()
    for attribute in node.attribute:
        name = attribute.name
        check_text(where, name)
        if not name:
            _fail(where, "has an attribute without a name", "a name")
        if name in seen:
            _fail(where, f"has the attribute {name} twice", "it once")
        seen.add(name)
        if attribute.type not in AttributeProto.AttributeType.values() or not attribute.type:
            _fail(where, f"has the attribute {name} of the unknown type {attribute.type}", "a type that ONNX defines")
        if not attribute.ref_attr_name:  # the attribute that a call puts in its place is checked after inlining
            _check_value(attribute, where)


def _check_value(attribute: AttributeProto, where: str) -> None:
    name, payload = attribute.name, _PAYLOADS.get(attribute.type)
    if payload is not None and not attribute.HasField(payload):
        _fail(where, f"has the attribute {name} without its value", f"a {_type_name(attribute.type)}")
    filled = {field.name for field, _ in attribute.ListFields()} & set(VALUE_FIELDS.values())
    if not filled <= {VALUE_FIELDS[attribute.type]}:
        _fail(where, f"has the attribute {name} with {sorted(filled)}", f"a {_type_name(attribute.type)} only")
    if name in _FLAGS and attribute.type == AttributeProto.INT and attribute.i not in (0, 1):
        _fail(where, f"has {name}={attribute.i}", "0 or 1")
    if name in _ELEMENT_TYPES and attribute.type == AttributeProto.INT and not _is_type(attribute):
        _fail(where, f"has {name}={attribute.i}", "the number of an element type")


def _is_type(attribute: AttributeProto) -> bool:
    optional = attribute.name != "to"
    return attribute.i in TensorProto.DataType.values() and (optional or attribute.i != TensorProto.UNDEFINED)


def _check_graphs(node: NodeProto, where: str) -> None:
    """Check that the graphs of If, Loop and Scan take and give as many values as their node."""
    entry = OPS.get((CLOSURE_DOMAIN, node.op_type))
    if entry is None or entry.graphs is None:
        return
    expected = entry.graphs(len(node.input), len(node.output))
    for attribute in node.attribute:
        found = (len(attribute.g.input), len(attribute.g.output))
        if attribute.type == AttributeProto.GRAPH and found != expected:
            _fail(
                where,
                f"has the graph {attribute.name} of {found[0]} inputs and {found[1]} outputs",
                f"{expected[0]} and {expected[1]}",
            )


def _check_definition(node: NodeProto, definition: Definition, where: str) -> None:
    _check_count(where, "inputs", len(node.input), definition.inputs)
    _check_count(where, "outputs", len(node.output), definition.outputs)
    for position, name in enumerate(node.input):
        if not name and position in definition.required:
            _fail(where, f"leaves out input {position}", "all but optional inputs")
    for attribute in node.attribute:
        expected = definition.attributes.get(attribute.name)
        if definition.takes_others and attribute.name in _INTEGERS:
            expected = AttributeProto.INT
        if expected is None and definition.takes_others:
            continue
        if expected is None:
            _fail(where, f"has the attribute {attribute.name}", f"one of {sorted(definition.attributes)}")
        if attribute.type != expected:
            _fail(
                where, f"has the attribute {attribute.name} of type {_type_name(attribute.type)}", _type_name(expected)
            )
    missing = definition.required_attributes - {attribute.name for attribute in node.attribute}
    if missing:
        _fail(where, f"lacks the attributes {sorted(missing)}", "them, as they have no default")


def _check_count(where: str, what: str, count: int, allowed: range) -> None:
    if count not in allowed:
        _fail(where, f"has {count} {what}", f"{allowed.start} to {allowed.stop - 1}")


@functools.lru_cache(maxsize=4096)
def _definition(op_type: str, domain: str, version: int) -> Definition | None:
    """The definition of an operator; None for an unknown one, which shape inference refuses later."""
    try:
        schema = onnx.defs.get_schema(op_type, version, domain)
    except onnx.defs.SchemaError:
        entry = OPS.get((domain, op_type))
        return None if entry is None else entry.definition
    optional = OpSchema.FormalParameterOption.Single
    return Definition(
        inputs=range(schema.min_input, schema.max_input + 1),
        outputs=range(schema.min_output, schema.max_output + 1),
        required=frozenset(i for i, parameter in enumerate(schema.inputs) if parameter.option == optional),
        attributes={name: _TYPES[attribute.type] for name, attribute in schema.attributes.items()},
        required_attributes=frozenset(name for name, attribute in schema.attributes.items() if attribute.required),
    )


def _type_name(number: int) -> str:
    return str(AttributeProto.AttributeType.Name(number))


def _fail(where: str, found: str, expected: str) -> NoReturn:
    raise ModelLoadError(f"{where} {found}, expected {expected}; the file is damaged, export the model again.")
