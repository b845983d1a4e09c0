"""Elementwise ops: dimensions are aligned from the right, and one of size 1 is broadcast."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from furiosa_llm.builder.rules import evaluate
from furiosa_llm.builder.rules.cost import SIGMOID, Cost, elementwise, function_flops, nothing, spent
from furiosa_llm.builder.rules.facts import Fact, present
from furiosa_llm.builder.rules.operands import takes
from furiosa_llm.builder.rules.registry import as_input, op, spell, whole, whole_inputs, words
from furiosa_llm.builder.rules.rule import Padding, Rule
from furiosa_llm.builder.rules.view import MICROSOFT, Inferred, NodeView, RuleFunction, ShapeRule

_FLOAT_BITS = {"FLOAT16": 16, "BFLOAT16": 16, "FLOAT": 32, "DOUBLE": 64}


def broadcast(view: NodeView) -> Rule:
    """`a b, 1 b -> a b` for any number of inputs."""
    out = view.out()
    names = [name if size != 1 else "1" for name, size in zip(words(len(out)), out, strict=True)]

    def aligned(shape: tuple[int, ...]) -> list[str]:
        tail = names[len(names) - len(shape) :]
        return [name if size != 1 else "1" for name, size in zip(tail, shape, strict=True)]

    inputs = [None if v is None else aligned(view.facts[v].shape) for v in view.node.inputs]
    return Rule(text=f"{spell(*inputs)} -> {spell(*[names for _ in view.node.outputs])}")


def pointwise(padding: Padding) -> RuleFunction:
    """Not linear: a partial sum must first be added up."""
    return lambda view: dataclasses.replace(broadcast(view), padding=padding)


def _of_all(dtype: ir.DataType | int = 0) -> ShapeRule:
    """The shape to which all inputs are broadcast, with a given type or the type of an input."""

    def infer(_: ir.Node, inputs: Sequence[Fact | None]) -> Inferred:
        present = [fact for fact in inputs if fact is not None]
        kind = dtype if isinstance(dtype, ir.DataType) else present[dtype].dtype
        return [(kind, np.broadcast_shapes(*(fact.shape for fact in present)))]

    return infer


_BROADCAST, _COMPARED = _of_all(), _of_all(ir.DataType.BOOL)


def power(view: NodeView) -> Rule:
    """A constant positive exponent keeps zeros, and an integer one keeps everything finite."""
    exponent = view.static_value(1)
    positive = exponent is not None and bool(np.all(exponent > 0))
    integer = exponent is not None and bool(np.all(exponent == np.round(exponent)))
    padding: Padding = "lost" if not positive else "moves" if integer else "fragile"
    return dataclasses.replace(broadcast(view), padding=padding, padding_ports=(0,))


def activation(view: NodeView) -> Rule:
    """Onnxruntime's activations, with an optional bias."""
    return dataclasses.replace(broadcast(view), padding="sum")


def gated_add(view: NodeView) -> Rule:
    """`x + y * gate`, one gate for each row; where the op projects the gate itself, it contracts the gate's input."""
    if view.has(3):
        return whole(view, note="GatedAdd with a projection inside: replicated")
    return dataclasses.replace(broadcast(view), padding="sum")


def negate(view: NodeView) -> Rule:
    """Linear in the only input."""
    return dataclasses.replace(broadcast(view), linear=(0,), padding="moves")


def add(view: NodeView) -> Rule:
    """Jointly linear in all inputs."""
    return dataclasses.replace(broadcast(view), linear=tuple(range(len(view.node.inputs))), padding="sum")


def multiply(view: NodeView) -> Rule:
    """Linear in either input."""
    return dataclasses.replace(broadcast(view), bilinear=True, padding="product")


def divide(view: NodeView) -> Rule:
    """Linear in the dividend (of floating point numbers); padding divides nothing."""
    linear = (0,) if view.fact(0).dtype.name in _FLOAT_BITS else ()
    return dataclasses.replace(broadcast(view), linear=linear, padding="moves", divisor=1)


def modulo(view: NodeView) -> Rule:
    """Padding divides nothing."""
    return dataclasses.replace(broadcast(view), padding="moves", divisor=1)


def where(view: NodeView) -> Rule:
    """Jointly linear in the two values."""
    return dataclasses.replace(broadcast(view), linear=(1, 2), padding="finite")


def cast(view: NodeView) -> Rule:
    """Linear where no precision is lost."""
    return dataclasses.replace(broadcast(view), linear=_exact(view), padding="moves")


def _exact(view: NodeView) -> tuple[int, ...]:
    """The first input, if its type loses nothing as the output's."""
    source, target = view.fact(0).dtype, view.facts[view.node.outputs[0]].dtype
    exact = source == target or _FLOAT_BITS.get(source.name, 64) < _FLOAT_BITS.get(target.name, 0)
    return (0,) if exact and source.name in _FLOAT_BITS else ()


def _cast_shape(node: ir.Node, inputs: Sequence[Fact | None]) -> Inferred:
    return [(ir.DataType(node.attributes["to"].as_int()), present(inputs[0]).shape)]


def cast_like(view: NodeView) -> Rule:
    """A Cast to the type of the second input, of which nothing else matters."""
    names = words(view.rank(0))
    text = f"{spell(names, ['.'] * view.rank(1))} -> {spell(names)}"
    return Rule(text=text, linear=_exact(view), padding="moves", padding_ports=(0,))


def dropout(view: NodeView) -> Rule:
    """The identity in inference (training is refused), with a mask of ones."""
    names = words(view.rank(0))
    outputs = [names] * len(view.node.outputs)
    alone = len(outputs) == 1
    text = f"{spell(names, *whole_inputs(view))} -> {spell(*outputs)}"
    return Rule(text=text, linear=(0,) if alone else (), padding="moves" if alone else "finite", padding_ports=(0,))


def quantized_elementwise(view: NodeView) -> Rule:
    """Codes with one scale for all of them: each element is computed by itself."""
    return dataclasses.replace(broadcast(view), padding="finite")


def _quantized_elementwise_shape(_: ir.Node, inputs: Sequence[Fact | None]) -> Inferred:
    a, b = present(inputs[0]), present(inputs[3])
    return [(a.dtype, np.broadcast_shapes(a.shape, b.shape))]


def quantized_where(view: NodeView) -> Rule:
    """Where of codes, which are brought to one scale."""
    return dataclasses.replace(broadcast(view), padding="finite")


def _quantized_where_shape(_: ir.Node, inputs: Sequence[Fact | None]) -> Inferred:
    condition, a, b = present(inputs[0]), present(inputs[1]), present(inputs[4])
    return [(a.dtype, np.broadcast_shapes(condition.shape, a.shape, b.shape))]


def _cost(view: NodeView) -> Cost:
    """For `n` inputs, `n - 1` operations an element, and Mean's division."""
    name = view.node.op_type
    match name:
        case "Sum" | "Max" | "Min" | "Mean":
            flops = len(view.node.inputs) - (name != "Mean")
        case "Gelu" if view.attribute("approximate", "none") == "tanh":
            flops = function_flops("FastGelu")
        case "FastGelu" if view.has(1):
            flops = function_flops("FastGelu") + 1
        case _:
            flops = function_flops(name)
    return elementwise(flops)(view)


def _gated_add_cost(view: NodeView) -> Cost:
    """A gate that the op projects takes a product for each row, and a sigmoid."""
    rows = math.prod(view.out()[:-1])
    projected = rows * (2 * view.shape(3)[0] + SIGMOID) if view.has(3) else 0
    return elementwise(2)(view) + Cost(flops=projected)


def _dropout_cost(view: NodeView) -> Cost:
    """A view in inference, except for the mask."""
    return spent(view, 0, reads={0: 0}, writes={0: 0})


op("Abs", rule=pointwise("moves"), shape=_BROADCAST, value=evaluate.unary(np.abs), total="always", cost=_cost)
op("Acos", rule=pointwise("lost"), shape=_BROADCAST, cost=_cost)
op("Acosh", rule=pointwise("lost"), cost=_cost)
op("And", rule=pointwise("finite"), shape=_COMPARED, value=evaluate.binary(np.logical_and), total="always", cost=_cost)
op("Asin", "Tan", rule=pointwise("fragile"), shape=_BROADCAST, cost=_cost)
op("Asinh", "Swish", rule=pointwise("moves"), cost=_cost)
op(
    "Celu",
    "Elu",
    "Erf",
    "Gelu",
    "HardSwish",
    "LeakyRelu",
    "Mish",
    "Relu",
    "Selu",
    "Sin",
    "Softsign",
    "Tanh",
    "ThresholdedRelu",
    rule=pointwise("moves"),
    shape=_BROADCAST,
    total="always",
    cost=_cost,
)
op("Atan", "PRelu", "Sinh", rule=pointwise("moves"), shape=_BROADCAST, cost=_cost)
op("Atanh", rule=pointwise("fragile"), cost=_cost)
op("BitCast", rule=pointwise("finite"), cost=nothing)
op("BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "Shrink", rule=pointwise("finite"), cost=_cost)
op("Cos", "HardSigmoid", "Sigmoid", "Softplus", rule=pointwise("finite"), shape=_BROADCAST, total="always", cost=_cost)
op("BitShift", "Cosh", rule=pointwise("finite"), shape=_BROADCAST, cost=_cost)
op("Ceil", rule=pointwise("moves"), shape=_BROADCAST, value=evaluate.unary(np.ceil), total="always", cost=_cost)
op("Clip", rule=pointwise("finite"), shape=_BROADCAST, value=evaluate.clip, total="always", cost=_cost)
op("Equal", rule=pointwise("finite"), shape=_COMPARED, value=evaluate.binary(np.equal), total="always", cost=_cost)
op("Exp", rule=pointwise("finite"), shape=_BROADCAST, value=evaluate.unary(np.exp), total="always", cost=_cost)
op("Floor", rule=pointwise("moves"), shape=_BROADCAST, value=evaluate.unary(np.floor), total="always", cost=_cost)
op("Greater", rule=pointwise("finite"), shape=_COMPARED, value=evaluate.binary(np.greater), total="always", cost=_cost)
op(
    "GreaterOrEqual",
    rule=pointwise("finite"),
    shape=_COMPARED,
    value=evaluate.binary(np.greater_equal),
    total="always",
    cost=_cost,
)
op("IsInf", rule=pointwise("finite"), shape=_COMPARED, total="always", cost=_cost)
op("IsNaN", rule=pointwise("finite"), shape=_COMPARED, value=evaluate.is_nan, total="always", cost=_cost)
op("Less", rule=pointwise("finite"), shape=_COMPARED, value=evaluate.binary(np.less), total="always", cost=_cost)
op(
    "LessOrEqual",
    rule=pointwise("finite"),
    shape=_COMPARED,
    value=evaluate.binary(np.less_equal),
    total="always",
    cost=_cost,
)
op("Log", rule=pointwise("lost"), shape=_BROADCAST, value=evaluate.unary(np.log), total="always", cost=_cost)
op("Max", rule=pointwise("sum"), shape=_BROADCAST, value=evaluate.variadic(np.maximum), total="always", cost=_cost)
op("Min", rule=pointwise("sum"), shape=_BROADCAST, value=evaluate.variadic(np.minimum), total="always", cost=_cost)
op("Not", rule=pointwise("finite"), shape=_COMPARED, value=evaluate.unary(np.logical_not), total="always", cost=_cost)
op("Or", rule=pointwise("finite"), shape=_COMPARED, value=evaluate.binary(np.logical_or), total="always", cost=_cost)
op(
    "Reciprocal",
    rule=pointwise("lost"),
    shape=_BROADCAST,
    value=evaluate.unary(np.reciprocal),
    total="always",
    cost=_cost,
)
op("Round", rule=pointwise("moves"), shape=_BROADCAST, value=evaluate.unary(np.round), total="always", cost=_cost)
op("Sign", rule=pointwise("moves"), shape=_BROADCAST, value=evaluate.unary(np.sign), total="always", cost=_cost)
op("Sqrt", rule=pointwise("fragile"), shape=_BROADCAST, value=evaluate.unary(np.sqrt), total="always", cost=_cost)
op("SwiGLU", rule=pointwise("product"), cost=_cost)
op("Xor", rule=pointwise("finite"), shape=_COMPARED, value=evaluate.binary(np.logical_xor), cost=_cost)
op("Pow", rule=power, shape=_BROADCAST, value=evaluate.power, total="floats", cost=_cost)
op(
    "Gelu",
    "QuickGelu",
    domain=MICROSOFT,
    rule=activation,
    shape=as_input,
    definition=takes(range(1, 2), (0,)),
    cost=_cost,
)
op("FastGelu", domain=MICROSOFT, rule=activation, shape=as_input, definition=takes(range(1, 3), (0,)), cost=_cost)
op("BiasGelu", domain=MICROSOFT, rule=activation, shape=as_input, definition=takes(range(2, 3), (0, 1)), cost=_cost)
op("ScaledSiLU", domain=MICROSOFT, rule=activation, shape=as_input, cost=_cost)
op("GatedAdd", domain=MICROSOFT, rule=gated_add, shape=as_input, cost=_gated_add_cost)
CUT = "furiosa_llm.cut"
"""The mark of an Identity whose input every rank has whole, and of whose output every rank has its part."""


def identity(view: NodeView) -> Rule:
    """The input itself, or the rank's part of an input that is whole."""
    if not view.node.meta.get(CUT):
        return negate(view)
    names = words(len(view.out()))
    return Rule(text=f"{spell(['*'] * len(names))} -> {spell(names)}; full {' '.join(names)}", padding="finite")


op("Identity", rule=identity, value=evaluate.unary(np.asarray), moves="form", total="always", cost=nothing)
op("Neg", rule=negate, shape=_BROADCAST, value=evaluate.unary(np.negative), moves="sign", total="always", cost=_cost)
op("Add", rule=add, shape=_BROADCAST, value=evaluate.binary(np.add), total="always", cost=_cost)
op("Sub", rule=add, shape=_BROADCAST, value=evaluate.binary(np.subtract), total="always", cost=_cost)
op("Sum", rule=add, shape=_BROADCAST, value=evaluate.variadic(np.add), total="always", cost=_cost)
op("Mean", rule=add, shape=_BROADCAST, value=evaluate.mean, cost=_cost)
op("Mul", rule=multiply, shape=_BROADCAST, value=evaluate.binary(np.multiply), total="always", cost=_cost)
op("Div", rule=divide, shape=_BROADCAST, value=evaluate.divide, total="floats", cost=_cost)
op("Mod", rule=modulo, shape=_BROADCAST, value=evaluate.mod, cost=_cost)
op("Where", rule=where, shape=_of_all(1), value=evaluate.where, total="always", cost=_cost)
op("Cast", rule=cast, shape=_cast_shape, value=evaluate.cast, moves="type", total="always", cost=_cost)
op("CastLike", rule=cast_like, value=evaluate.cast_like, moves="type", cost=_cost)
op("Dropout", rule=dropout, cost=_dropout_cost)
op(
    "QLinearAdd",
    "QLinearMul",
    domain=MICROSOFT,
    rule=quantized_elementwise,
    shape=_quantized_elementwise_shape,
    cost=_cost,
)
op("QLinearSigmoid", "QLinearLeakyRelu", domain=MICROSOFT, rule=quantized_elementwise, shape=as_input, cost=_cost)
op("QLinearWhere", domain=MICROSOFT, rule=quantized_where, shape=_quantized_where_shape, cost=_cost)
