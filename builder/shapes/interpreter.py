"""Abstract shape interpreter: run the graph on shapes and on the few small tensors that shapes depend on.

Concrete sizes stand for the dynamic dimensions; running twice, at two sets of distinct primes, tells which dimensions
are dynamic. No weight is ever read. `onnx.shape_inference` gives the types and shapes of standard ops; the entries in
`builder.rules` give the types and shapes of onnxruntime's own ops.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx.shape_inference import infer_node_outputs

from furiosa_llm.builder.errors import ShapeError, UnsupportedModelError
from furiosa_llm.builder.rules import op_of
from furiosa_llm.builder.rules.facts import Fact as Fact
from furiosa_llm.builder.rules.facts import Facts as Facts
from furiosa_llm.builder.rules.facts import Shape as Shape
from furiosa_llm.builder.rules.view import ShapeRule as ShapeRule
from furiosa_llm.builder.rules.view import SizeMismatchError as SizeMismatchError
from furiosa_llm.builder.rules.view import attributes_of as attributes_of
from furiosa_llm.builder.shapes.closures import is_control_flow
from furiosa_llm.builder.shapes.control_flow import SIBLINGS, ControlFlow
from furiosa_llm.builder.shapes.operand_checks import operand_fault, result_fault
from furiosa_llm.runtime.artifact.dtypes import DTYPES

DATA_DEPENDENT = "an output's size depends on the inputs' elements"
_MAX_KNOWN_ELEMENTS = 4096
_MAX_READ_NBYTES = 1024
"""Constants larger than this are weights to the interpreter: their values are never looked at."""


class Interpreter:
    """Interprets one graph at any number of input size sets.

    `collectives` are the shape rules of the program's own ops, which no model contains. If `lenient`, the branches of
    an If need not agree where its condition is known.
    """

    def __init__(
        self, model: ir.Model, collectives: Mapping[tuple[str, str], ShapeRule] | None = None, *, lenient: bool = False
    ) -> None:
        self._model = model
        self._collectives = collectives or {}
        self._opsets = dict(model.graph.opset_imports)
        self._protos: dict[ir.Node, onnx.NodeProto] = {}
        self._runs = 0
        self._fresh: Iterator[int] = iter(())
        self._interned: dict[object, Fact] = {}
        self._known: set[int] = set()
        self._signatures: dict[object, int] = {}
        self._inferred: dict[tuple[int, ...], list[Fact]] = {}
        self._numbers: dict[ir.Node, int] = {}
        self._inside: Facts = {}
        self._control_flow = ControlFlow(self._interpret_inside, model.graph.meta.get(SIBLINGS, ()), lenient=lenient)
        self._constants = {v: self._intern(_constant_fact(v)) for v in model.graph.initializers.values()}

    def run(self, sizes: Mapping[str, Shape], lengths: Mapping[str, int] = MappingProxyType({})) -> Facts:
        """Facts of every value when graph input `name` has the shape `sizes[name]`; ShapeError if shapes contradict.

        `lengths` are the elements of inputs that shapes depend on.
        """
        facts: Facts = dict(self._constants)
        self._runs += 1
        self._fresh = itertools.count(101 + self._runs, 10)
        for value in self._model.graph.inputs:
            assert value.name is not None
            assert value.dtype is not None
            facts[value] = self._intern(_input_fact(value.dtype, sizes[value.name], lengths.get(value.name)))
        self.interpret(self._model.graph, facts)
        return facts

    def run_inside(self, sizes: Mapping[str, Shape]) -> Facts:
        """Like `run`, with the facts of values in branches and bodies; the facts of a body hold for any iteration."""
        self._inside.clear()
        return self.run(sizes) | self._inside

    def _interpret_inside(self, graph: ir.Graph, facts: Facts) -> None:
        self.interpret(graph, facts)
        self._inside.update((v, facts[v]) for v in (*graph.inputs, *(v for node in graph for v in node.outputs)))

    def interpret(self, graph: ir.Graph, facts: Facts) -> None:
        """Add the facts of the nodes' outputs to `facts`, which holds the facts of all values that `graph` reads."""
        for node in graph:
            inputs = [None if v is None else facts[v] for v in node.inputs]
            if is_control_flow(node):
                found = self._control_flow.infer(node, inputs, facts)
            else:
                found = self._infer_once(node, inputs)
            if len(found) != len(node.outputs):
                raise _contradiction(node, inputs, f"it gives {len(found)} outputs")
            facts.update(zip(node.outputs, map(self._intern, found), strict=True))

    def _number(self, node: ir.Node) -> int:
        """A number that nodes share if they do the same to the same inputs."""
        if node not in self._numbers:
            attributes = tuple(sorted((name, attribute_key(a)) for name, a in node.attributes.items()))
            key = (node.domain, node.op_type, len(node.outputs), tuple(v is None for v in node.inputs), attributes)
            self._numbers[node] = self._signatures.setdefault(key, len(self._signatures))
        return self._numbers[node]

    def _intern(self, fact: Fact) -> Fact:
        """The first fact that says the same, so that equal facts are one object."""
        if id(fact) in self._known:
            return fact
        content = None if fact.value is None else (fact.value.dtype.str, fact.value.tobytes())
        found = self._interned.setdefault((fact.dtype, fact.shape, content, fact.zero), fact)
        self._known.add(id(found))
        return found

    def _infer_once(self, node: ir.Node, inputs: Sequence[Fact | None]) -> list[Fact]:
        """The outputs' facts. Equal nodes of all layers are inferred once: only NonZero gives other sizes each time."""
        if node.op_type == "NonZero" and not node.domain:
            assert inputs[0] is not None
            unknown = [Fact(dtype=ir.DataType.INT64, shape=(len(inputs[0].shape), next(self._fresh)))]
            return self._evaluate(node, inputs) or unknown
        key = (self._number(node), *(id(None if f is None else self._intern(f)) for f in inputs))
        if key not in self._inferred:
            self._inferred[key] = [self._intern(fact) for fact in self._infer(node, inputs)]
        return self._inferred[key]

    def _infer(self, node: ir.Node, inputs: Sequence[Fact | None]) -> list[Fact]:
        shapes = [None if f is None else f.shape for f in inputs]
        reason = operand_fault(node, shapes)
        if reason is not None:
            raise _contradiction(node, inputs, reason)
        evaluated = self._evaluate(node, inputs)
        if evaluated is not None:
            return evaluated
        entry = op_of(node)
        rule = self._collectives.get((node.domain, node.op_type)) if entry is None else entry.shape
        if rule is not None:
            try:
                pairs = rule(node, inputs)
            except (ArithmeticError, LookupError, TypeError, ValueError, onnx.checker.ValidationError) as error:
                raise _contradiction(node, inputs, str(error)) from error
        else:
            pairs = self._infer_with_onnx(node, inputs)
        zero = _is_zero(node, inputs)
        reason = result_fault(node, shapes, [shape for _, shape in pairs])
        if reason is not None:
            raise _contradiction(node, inputs, reason)
        return [Fact(dtype=dtype, shape=shape, zero=zero) for dtype, shape in pairs]

    def _evaluate(self, node: ir.Node, inputs: Sequence[Fact | None]) -> list[Fact] | None:
        """The outputs' elements, if they follow from the shapes alone and are few."""
        entry = op_of(node)
        if entry is None:
            return None
        if entry.of_shape is not None and inputs[0] is not None:
            return [_known(entry.of_shape(attributes_of(node), inputs[0].shape), zero=False)]
        if entry.value is None or any(f is not None and f.value is None for f in inputs):
            return None
        arguments = [None if f is None else f.value for f in inputs]
        given = [argument for argument in arguments if argument is not None]
        if entry.made is not None and entry.made(given) > _MAX_KNOWN_ELEMENTS:
            return None
        try:
            result = entry.value(attributes_of(node), arguments)
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise _contradiction(node, inputs, str(error)) from error
        zero = _is_zero(node, inputs)
        return [_known(np.asarray(r), zero=zero) for r in (result if isinstance(result, tuple) else (result,))]

    def _infer_with_onnx(self, node: ir.Node, inputs: Sequence[Fact | None]) -> list[tuple[ir.DataType, Shape]]:
        try:
            schema = onnx.defs.get_schema(node.op_type, self._opsets.get(node.domain, 1), node.domain)
        except onnx.defs.SchemaError as error:
            raise UnsupportedModelError(
                f'node "{node.name}" is the op {node.domain or "ai.onnx"}::{node.op_type} (opset '
                f"{self._opsets.get(node.domain)}), which is not known here; export the model with standard ops, or "
                "with the function that defines it."
            ) from error
        proto = self._protos.get(node)
        if proto is None:
            proto = self._protos[node] = ir.to_proto(node)
        types: dict[str, onnx.TypeProto] = {}
        data: dict[str, onnx.TensorProto] = {}
        for name, fact in zip(proto.input, inputs, strict=True):
            if fact is not None:
                types[name] = onnx.helper.make_tensor_type_proto(int(fact.dtype), fact.shape)
                if fact.value is not None and fact.value.dtype.kind in "iub":
                    data[name] = onnx.numpy_helper.from_array(fact.value, name)
        imports = [onnx.helper.make_opsetid(domain, version) for domain, version in self._opsets.items()]
        try:
            outputs = infer_node_outputs(schema, proto, types, data, opset_imports=imports)
        except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError) as error:
            raise _contradiction(node, inputs, str(error)) from error
        return [_from_type(outputs.get(name), node, inputs) for name in proto.output]


def _input_fact(dtype: ir.DataType, shape: Shape, length: int | None) -> Fact:
    value = None if length is None else np.full(shape, length, dtype=dtype.numpy())
    return Fact(dtype=dtype, shape=shape, value=value)


def attribute_key(attribute: ir.Attr) -> object:
    """A key to compare an attribute by; a tensor is compared by its elements."""
    if attribute.type is ir.AttributeType.TENSOR:
        tensor = attribute.as_tensor()
        return tensor.dtype, tuple(tensor.shape.numpy()), tensor.tobytes()
    value = attribute.value
    return str(attribute.type), tuple(value) if isinstance(value, list) else value


def _constant_fact(value: ir.Value) -> Fact:
    tensor = value.const_value
    assert tensor is not None
    if tensor.dtype.name not in DTYPES:
        raise UnsupportedModelError(
            f'constant "{value.name}" has elements of type {tensor.dtype.name}, expected one of {", ".join(DTYPES)}; '
            "export the model without them."
        )
    shape = tuple(tensor.shape.numpy())
    known = _read(tensor) if tensor.nbytes <= _MAX_READ_NBYTES else None
    zero = known is not None and not known.astype(bool).any()
    return Fact(dtype=tensor.dtype, shape=shape, value=known, zero=zero)


def _read(tensor: ir.TensorProtocol) -> npt.NDArray[Any] | None:
    """The elements of a small constant; None if its data file is absent, as it may be when planning."""
    try:
        return tensor.numpy()
    except FileNotFoundError:
        return None


def _known(value: npt.NDArray[Any], *, zero: bool) -> Fact:
    known = value if value.size <= _MAX_KNOWN_ELEMENTS else None
    return Fact(dtype=ir.DataType.from_numpy(value.dtype), shape=value.shape, value=known, zero=zero)


def _is_zero(node: ir.Node, inputs: Sequence[Fact | None]) -> bool:
    """Whether a node gives zeros at any sizes, and not by chance at the present sizes."""
    first = inputs[0] if inputs else None
    if node.op_type == "ConstantOfShape":
        return not _fill_value(node)
    entry = op_of(node)
    return first is not None and first.zero and entry is not None and entry.keeps_zeros


def _fill_value(node: ir.Node) -> bool:
    value = node.attributes.get("value")
    return value is not None and bool(value.as_tensor().numpy().any())


def _from_type(proto: onnx.TypeProto | None, node: ir.Node, inputs: Sequence[Fact | None]) -> tuple[ir.DataType, Shape]:
    kind = None if proto is None else proto.WhichOneof("value")
    if kind not in (None, "tensor_type"):
        raise UnsupportedModelError(
            f'node {node.op_type} "{node.name}" gives a value of type {str(kind).removesuffix("_type")}, '
            "expected a tensor; export the model without sequences, optionals and maps."
        )
    if proto is None or kind is None or not proto.tensor_type.HasField("shape"):
        raise _contradiction(node, inputs, "the shape of an output does not follow from the inputs' shapes")
    dims = proto.tensor_type.shape.dim
    if not all(dim.HasField("dim_value") for dim in dims):
        raise _contradiction(node, inputs, DATA_DEPENDENT)
    return ir.DataType(proto.tensor_type.elem_type), tuple(dim.dim_value for dim in dims)


class MisfitError(ShapeError):
    """The operands of a node do not fit each other; the message shows their shapes at one set of sizes."""

    def __init__(self, message: str, node: ir.Node) -> None:
        super().__init__(message)
        self.node = node


def _contradiction(node: ir.Node, inputs: Sequence[Fact | None], reason: str) -> MisfitError:
    found = ", ".join("-" if f is None else f"{f.dtype.name}{list(f.shape)}" for f in inputs)
    first_line = reason.strip().partition("\n")[0][:300].rstrip(".")
    return MisfitError(f'node {node.op_type} "{node.name}" does not fit its inputs ({found:.300}): {first_line}.', node)
