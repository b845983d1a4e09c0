"""The one registry of op rules: `(domain, op type) -> function(view) -> Rule`, and shapes of onnxruntime's own ops."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx.shape_inference import infer_node_outputs

from furiosa_llm.builder.errors import ShapeError
from furiosa_llm.builder.rules.rule import Rule
from furiosa_llm.builder.shapes.interpreter import Fact, Facts, ShapeRule, attributes_of

MICROSOFT = "com.microsoft"
_STANDARD_OPSET = 21
"""The opset whose ops onnxruntime's own are like."""

# fmt: off
WEIGHT_MOVERS = frozenset((
    "Cast", "DequantizeLinear", "Gather", "GatherND", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose",
    "Unsqueeze",
))
# fmt: on
"""Ops that move, select or convert a weight's elements: what they give is a weight, too."""


@dataclasses.dataclass(frozen=True, slots=True)
class NodeView:
    """A node with what is known of its inputs and outputs, as rules see it."""

    node: ir.Node
    facts: Facts
    others: Facts
    """Facts at other sizes of the dynamic dimensions: what differs is dynamic."""
    opset: int
    """The version of the standard ops."""

    def swapped(self) -> NodeView:
        """The same node seen at the other sizes."""
        return NodeView(self.node, self.others, self.facts, self.opset)

    def has(self, port: int) -> bool:
        """Whether input `port` is there."""
        return port < len(self.node.inputs) and self.node.inputs[port] is not None

    def fact(self, port: int) -> Fact:
        """What is known of input `port`, which must be there."""
        value = self.node.inputs[port]
        assert value is not None
        return self.facts[value]

    def shape(self, port: int) -> tuple[int, ...]:
        """The shape of input `port`."""
        return self.fact(port).shape

    def out(self, port: int = 0) -> tuple[int, ...]:
        """The shape of output `port`."""
        return self.facts[self.node.outputs[port]].shape

    def rank(self, port: int) -> int:
        """The number of dimensions of input `port`."""
        return len(self.shape(port))

    def static_value(self, port: int) -> npt.NDArray[Any] | None:
        """The elements of input `port` if they are known and the same at all sizes."""
        value = self.node.inputs[port] if self.has(port) else None
        if value is None:
            return None
        first, second = self.facts[value].value, self.others[value].value
        same = first is not None and second is not None and np.array_equal(first, second)
        return first if same else None

    def is_weight(self, port: int) -> bool:
        """Whether input `port` is an initializer, or one that was merely moved."""
        value = self.node.inputs[port] if self.has(port) else None
        while value is not None and not value.is_initializer():
            producer = value.producer()
            value = producer.inputs[0] if producer is not None and producer.op_type in WEIGHT_MOVERS else None
        return value is not None

    def is_dynamic(self, port: int, dim: int) -> bool:
        """Whether dimension `dim` of input `port` differs from run to run."""
        value = self.node.inputs[port]
        assert value is not None
        return self.facts[value].shape[dim] != self.others[value].shape[dim]

    def attribute(self, name: str, default: Any = None) -> Any:
        """An attribute's value, or `default`."""
        found = self.node.attributes.get(name)
        return default if found is None else found.value

    def axes(self, port: int, default: tuple[int, ...] | None = None) -> tuple[int, ...] | None:
        """The axes given as input `port` or as the attribute `axes`; None if given as a tensor of unknown content."""
        if self.has(port):
            value = self.static_value(port)
            return None if value is None else tuple(int(v) for v in np.atleast_1d(value))
        found = self.attribute("axes")
        return default if found is None else tuple(found)


RuleFunction = Callable[[NodeView], Rule]

RULES: dict[tuple[str, str], RuleFunction] = {}
SHAPES: dict[tuple[str, str], ShapeRule] = {}


def rule(*op_types: str, domain: str = "") -> Callable[[RuleFunction], RuleFunction]:
    """Register a rule for some op types of one domain."""

    def register(function: RuleFunction) -> RuleFunction:
        for op_type in op_types:
            assert (domain, op_type) not in RULES, f"{domain}::{op_type} has two rules"
            RULES[domain, op_type] = function
        return function

    return register


def shape_rule(*op_types: str, domain: str = MICROSOFT) -> Callable[[ShapeRule], ShapeRule]:
    """Register the output types and shapes of ops that ONNX does not define."""

    def register(function: ShapeRule) -> ShapeRule:
        for op_type in op_types:
            SHAPES[domain, op_type] = function
        return function

    return register


def standard_shape(op_type: str, *, drop_inputs_from: int | None = None) -> ShapeRule:
    """The shape rule of an op of onnxruntime's that has the shapes of a standard op."""

    def infer(node: ir.Node, inputs: Sequence[Fact | None]) -> list[tuple[ir.DataType, tuple[int, ...]]]:
        proto = ir.to_proto(node)
        proto.op_type, proto.domain = op_type, ""
        del proto.input[drop_inputs_from if drop_inputs_from is not None else len(proto.input) :]
        schema = onnx.defs.get_schema(op_type, _STANDARD_OPSET, "")
        for attribute in [a for a in proto.attribute if a.name not in schema.attributes]:
            proto.attribute.remove(attribute)
        facts = {name: fact for name, fact in zip(proto.input, inputs, strict=False) if fact is not None}
        types = {name: onnx.helper.make_tensor_type_proto(int(f.dtype), f.shape) for name, f in facts.items()}
        data = {n: onnx.numpy_helper.from_array(f.value, n) for n, f in facts.items() if f.value is not None}
        try:
            outputs = infer_node_outputs(schema, proto, types, data)
        except onnx.shape_inference.InferenceError as error:
            raise ShapeError(f'{node.op_type} "{node.name}" does not fit its inputs: {str(error).strip()}.') from error
        found = [outputs[name].tensor_type for name in proto.output]
        if not all(dim.HasField("dim_value") for t in found for dim in t.shape.dim):
            raise ShapeError(
                f'{node.op_type} "{node.name}" has an output whose size follows from what the inputs hold, expected '
                "sizes that follow from sizes; export the model with constants there."
            )
        return [(ir.DataType(t.elem_type), tuple(d.dim_value for d in t.shape.dim)) for t in found]

    return infer


def words(count: int, prefix: str = "") -> list[str]:
    """`count` distinct symbols: a, b, c, ... (with a prefix: xa, xb, ...)."""
    return [prefix + (chr(ord("a") + i) if i < 26 else f"z{i}") for i in range(count)]


def spell(*operands: list[str] | None) -> str:
    """Operands of a rule's text."""
    return ", ".join("_" if dims is None else " ".join(dims) for dims in operands)


def whole(view: NodeView, note: str | None = None) -> Rule:
    """The rule of an op that needs everything whole and computes everything whole."""
    inputs = [None if v is None else ["*"] * len(view.facts[v].shape) for v in view.node.inputs]
    outputs = [["*"] * len(view.facts[v].shape) for v in view.node.outputs]
    return Rule(text=f"{spell(*inputs)} -> {spell(*outputs)}", note=note)


def rule_of(view: NodeView) -> Rule:
    """The rule of a node; an op without one is replicated, with a note.

    A rule may compare sizes only where the op's meaning makes equal sizes the same dimension. Where it says something
    else at other sizes, two dimensions were equal by chance, and nothing is said. Raises ShapeError for a node that the
    rule of its op does not fit.
    """
    op = f"{view.node.domain or 'ai.onnx'}::{view.node.op_type}"
    function = RULES.get((view.node.domain, view.node.op_type))
    if function is None:
        return whole(view, note=f"no rule for {op}: replicated")
    try:
        found, other = function(view), function(view.swapped())
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise ShapeError(
            f'node {view.node.op_type} "{view.node.name}" has attributes or operands that {op} does not take '
            f"({type(error).__name__}: {error}); the model is damaged, export it again."
        ) from error
    if other.text != found.text:
        return whole(view, note=f"{op} relates its dimensions differently at different sizes: replicated")
    return found


__all__ = [
    "MICROSOFT",
    "RULES",
    "SHAPES",
    "WEIGHT_MOVERS",
    "NodeView",
    "attributes_of",
    "rule",
    "rule_of",
    "shape_rule",
    "spell",
    "standard_shape",
    "whole",
    "words",
]
