"""Kernels of onnxruntime that end the process for some values, or take memory uncounted: guarded, or refused.

NonZero keeps the indices of all elements in memory of its own: as much is allocated, and counted, before it runs.

Division of integers: the least one by -1, which the processor traps. A quotient by -1 is the dividend with the other
sign, and where a divisor may be -1, that is what is computed. STFT divides by the length of its frames.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, MutableSequence, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from furiosa_llm.runtime.artifact.graphs import all_nodes, attribute_graphs

_UNCOUNTED = frozenset({"StringConcat", "StringNormalizer", "StringSplit", "TfIdfVectorizer", "Unique"})
"""Ops that no build puts into a program."""
_FATAL = frozenset({"Div", "GatherND", "NonZero", "STFT", *_UNCOUNTED})
_MAX_DIMS = 64
_STANDARD = ("", "ai.onnx")
_TRAPPING = (TensorProto.INT32, TensorProto.INT64)
_WITH_GRAPHS = ("If", "Loop", "Scan")
"""Ops whose inputs and outputs have types of their own under one name."""
_CONSTANTS = {"value_float": TensorProto.FLOAT, "value_floats": TensorProto.FLOAT, "value_int": TensorProto.INT64}


class _Scope:
    """What is known of the values of a graph: the types of some, and the elements of constants."""

    def __init__(self, types: Mapping[str, int], constants: Mapping[str, TensorProto], version: int) -> None:
        self.types = dict(types)
        self.constants = dict(constants)
        self.version = version

    def within(self, graph: onnx.GraphProto) -> _Scope:
        """That of a graph in a node."""
        inner = _Scope(self.types, self.constants, self.version)
        for value in graph.input:
            inner.types.pop(value.name, None)
            inner.constants.pop(value.name, None)
        inner.take(graph)
        return inner

    def take(self, graph: onnx.GraphProto) -> None:
        """What a graph says of its inputs and initializers."""
        for value in graph.input:
            if value.type.tensor_type.elem_type:
                self.types[value.name] = value.type.tensor_type.elem_type
        for tensor in graph.initializer:
            self.types[tensor.name] = tensor.data_type
            self.constants[tensor.name] = tensor

    def add(self, node: NodeProto) -> None:
        """What follows from a node of its outputs."""
        attributes = {attribute.name: attribute for attribute in node.attribute}
        if node.op_type == "Constant" and "value" in attributes:
            self.constants[node.output[0]] = attributes["value"].t
        for place, name in enumerate(node.output):
            found = self._type(node, place, attributes)
            if found is not None:
                self.types[name] = found

    def _type(self, node: NodeProto, place: int, attributes: Mapping[str, AttributeProto]) -> int | None:
        if node.domain not in _STANDARD or node.op_type in _WITH_GRAPHS:
            return None
        if node.op_type == "Cast" and "to" in attributes:
            return int(attributes["to"].i)
        if node.op_type == "Constant":
            value = attributes.get("value")
            return value.t.data_type if value else next((_CONSTANTS[n] for n in attributes if n in _CONSTANTS), None)
        rules = _typing(node.op_type, self.version)
        rule = rules[min(place, len(rules) - 1)] if rules else None
        if rule is None or rule >= 0:
            return rule
        number = -1 - rule
        return self.types.get(node.input[number]) if number < len(node.input) else None

    def may_trap(self, node: NodeProto) -> bool:
        """Whether a node may divide integers by -1."""
        if node.op_type != "Div" or node.domain not in _STANDARD or len(node.input) != 2:
            return False
        known = next((self.types[name] for name in (*node.input, *node.output) if name in self.types), None)
        if known is not None and known not in _TRAPPING:
            return False
        divisor = self._elements(node.input[1])
        return divisor is None or bool(np.any(divisor == -1))

    def reason(self, node: NodeProto) -> str | None:
        """Why a node is refused; None: it is not."""
        if node.op_type in _UNCOUNTED:
            return "takes memory that no limit counts"
        if node.op_type == "GatherND" and any(not 0 <= attribute.i < _MAX_DIMS for attribute in node.attribute):
            return "has no plausible batch_dims"
        if node.op_type == "STFT":
            window, frame = (self._elements(name) if name else None for name in [*node.input, "", ""][2:4])
            lengths = [*([window.size] if window is not None else []), *([int(frame)] if frame is not None else [])]
            if len(lengths) != sum(map(bool, node.input[2:4])) or min(lengths, default=0) < 1:
                return "has frames of no constant length"
        return None

    def _elements(self, name: str) -> Any:
        """Those of a constant; None for anything else."""
        tensor = self.constants.get(name)
        if tensor is None or tensor.data_location == TensorProto.EXTERNAL:
            return None
        return numpy_helper.to_array(tensor)


@functools.lru_cache(maxsize=1024)
def _typing(op_type: str, version: int) -> tuple[int | None, ...]:
    """The type of each output of an op: itself, -1 - n for that of input n, or None if it is not plain."""
    try:
        schema = onnx.defs.get_schema(op_type, version, "")
    except onnx.defs.SchemaError:
        return ()
    inputs = [given.type_str for given in schema.inputs]
    return tuple(
        -1 - inputs.index(output.type_str)
        if output.type_str in inputs
        else TensorProto.DataType.Value(next(iter(output.types))[len("tensor(") : -1].upper())
        if len(output.types) == 1 and next(iter(output.types)) in ("tensor(int64)", "tensor(float)", "tensor(int32)")
        else None
        for output in schema.outputs
    )


def guard_kernels(model: ModelProto) -> None:
    """Makes no node of `model` end the process, and no value another; RuntimeError for one that cannot be guarded."""
    every = (*model.graph.node, *(node for function in model.functions for node in function.node))
    if _FATAL.isdisjoint(node.op_type for node in all_nodes(every)):
        return
    version = max((entry.version for entry in model.opset_import if entry.domain in _STANDARD), default=1)
    scope = _Scope({}, {}, version)
    scope.take(model.graph)
    _guard(model.graph.node, scope)
    for function in model.functions:
        _guard(function.node, _Scope({}, {}, version))


def _guard(nodes: MutableSequence[NodeProto], scope: _Scope) -> None:
    kept: list[NodeProto] = []
    for node in nodes:
        for graph in attribute_graphs(node):
            _guard(graph.node, scope.within(graph))
        if node.domain in _STANDARD and (reason := scope.reason(node)) is not None:
            raise RuntimeError(f"{node.op_type} (node {node.name!r:.80}) {reason}, which can end the process")
        if scope.may_trap(node):
            kept += _guarded(node)
        elif node.op_type == "NonZero" and node.domain in _STANDARD:
            kept += _counted(node)
        else:
            kept.append(node)
        scope.add(node)
    if len(kept) > len(nodes):
        copies = [NodeProto.FromString(node.SerializeToString()) for node in kept]
        del nodes[:]
        nodes.extend(copies)


def _guarded(node: NodeProto) -> Sequence[NodeProto]:
    """The nodes for a division, of any type: by 1, of the dividend with the other sign, where the divisor is -1."""
    dividend, divisor = node.input
    return list(_steps(dividend, divisor, node.output[0]))


def _steps(dividend: str, divisor: str, quotient: str) -> Iterator[NodeProto]:
    def made(what: str) -> str:
        return f"{quotient}/guarded/{what}"

    for op, inputs, output in (
        ("Sign", [divisor], made("sign")),
        ("Abs", [divisor], made("size")),
        ("Equal", [divisor, made("sign")], made("small")),
        ("Equal", [divisor, made("size")], made("positive")),
        ("Not", [made("positive")], made("negative")),
        ("And", [made("small"), made("negative")], made("minus")),
        ("Mul", [dividend, divisor], made("product")),
        ("Where", [made("minus"), made("product"), dividend], made("dividend")),
        ("Where", [made("minus"), made("size"), divisor], made("divisor")),
        ("Div", [made("dividend"), made("divisor")], quotient),
    ):
        yield helper.make_node(op, inputs, [output], name=output)


def _counted(node: NodeProto) -> Iterator[NodeProto]:
    """The nodes for a NonZero: of the same data, whose shape waits for zeros in the place of all indices."""
    [data], [found] = node.input, node.output

    def made(what: str) -> str:
        return f"{found}/counted/{what}"

    one = numpy_helper.from_array(np.array([1], np.int64))
    zero = numpy_helper.from_array(np.array([0], np.int64))
    for op, inputs, output, attributes in (
        ("Constant", [], made("one"), {"value": one}),
        ("Shape", [data], made("shape"), {}),
        ("Size", [made("shape")], made("rank"), {}),
        ("Size", [data], made("elements"), {}),
        ("Mul", [made("rank"), made("elements")], made("indices"), {}),
        ("Reshape", [made("indices"), made("one")], made("length"), {}),
        ("ConstantOfShape", [made("length")], made("zeros"), {"value": zero}),
        ("ReduceSum", [made("zeros")], made("zero"), {"keepdims": 0}),
        ("Add", [made("shape"), made("zero")], made("same"), {}),
        ("Reshape", [data, made("same")], made("data"), {}),
        ("NonZero", [made("data")], found, {}),
    ):
        yield helper.make_node(op, inputs, [output], name=output, **attributes)
