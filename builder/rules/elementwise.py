"""Elementwise ops: dimensions are aligned from the right, and one of size 1 is broadcast."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from furiosa_llm.builder.rules.registry import MICROSOFT, NodeView, rule, shape_rule, spell, whole, words
from furiosa_llm.builder.rules.rule import Padding, Rule
from furiosa_llm.builder.shapes.interpreter import Fact

# fmt: off
_PADDING: dict[Padding, tuple[str, ...]] = {
    "moves": (
        "Abs", "Asinh", "Atan", "Ceil", "Celu", "Elu", "Erf", "Floor", "Gelu", "HardSwish", "LeakyRelu", "Mish",
        "PRelu", "Relu", "Round", "Selu", "Sign", "Sin", "Sinh", "Softsign", "Swish", "Tanh", "ThresholdedRelu",
    ),
    "sum": ("Max", "Min"),
    "finite": (
        "And", "BitCast", "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "Clip", "Cos",
        "Cosh", "Equal", "Exp", "Greater", "GreaterOrEqual", "HardSigmoid", "IsInf", "IsNaN", "Less", "LessOrEqual",
        "Not", "Or", "Shrink", "Sigmoid", "Softplus", "Xor",
    ),
    "product": ("SwiGLU",),
    "fragile": ("Asin", "Atanh", "Sqrt", "Tan"),
    "lost": ("Acos", "Acosh", "Log", "Reciprocal"),
}
# fmt: on
_POINTWISE: dict[str, Padding] = {op_type: padding for padding, op_types in _PADDING.items() for op_type in op_types}
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


@rule(*_POINTWISE)
def pointwise(view: NodeView) -> Rule:
    """Not linear: a partial sum must be added up first."""
    return dataclasses.replace(broadcast(view), padding=_POINTWISE[view.node.op_type])


@rule("Pow")
def power(view: NodeView) -> Rule:
    """A constant positive exponent keeps zeros, and an integer one keeps everything finite."""
    exponent = view.static_value(1)
    positive = exponent is not None and bool(np.all(exponent > 0))
    integer = exponent is not None and bool(np.all(exponent == np.round(exponent)))
    padding: Padding = "lost" if not positive else "moves" if integer else "fragile"
    return dataclasses.replace(broadcast(view), padding=padding, padding_ports=(0,))


@rule("Gelu", "QuickGelu", "FastGelu", "BiasGelu", "ScaledSiLU", domain=MICROSOFT)
def activation(view: NodeView) -> Rule:
    """Activations of onnxruntime's, with an optional bias."""
    return dataclasses.replace(broadcast(view), padding="sum")


@rule("GatedAdd", domain=MICROSOFT)
def gated_add(view: NodeView) -> Rule:
    """`x + y * gate`, one gate for each row; a gate that is projected inside the op contracts what it is made of."""
    if view.has(3):
        return whole(view, note="GatedAdd with a projection inside: replicated")
    return dataclasses.replace(broadcast(view), padding="sum")


@shape_rule("Gelu", "QuickGelu", "FastGelu", "BiasGelu", "ScaledSiLU", "GatedAdd", "QLinearSigmoid", "QLinearLeakyRelu")
def _activation_shape(_: ir.Node, inputs: Sequence[Fact | None]) -> list[tuple[ir.DataType, tuple[int, ...]]]:
    data = inputs[0]
    assert data is not None
    return [(data.dtype, data.shape)]


CUT = "furiosa_llm.cut"
"""The mark of an Identity whose input every rank has whole, and whose output it has its part of."""


@rule("Identity")
def identity(view: NodeView) -> Rule:
    """What it is given, or of an input that is whole, the rank's part."""
    if not view.node.meta.get(CUT):
        return negate(view)
    names = words(len(view.out()))
    return Rule(text=f"{spell(['*'] * len(names))} -> {spell(names)}; full {' '.join(names)}", padding="finite")


@rule("Neg")
def negate(view: NodeView) -> Rule:
    """Linear in the only input."""
    return dataclasses.replace(broadcast(view), linear=(0,), padding="moves")


@rule("Add", "Sub", "Sum", "Mean")
def add(view: NodeView) -> Rule:
    """Jointly linear in all inputs."""
    return dataclasses.replace(broadcast(view), linear=tuple(range(len(view.node.inputs))), padding="sum")


@rule("Mul")
def multiply(view: NodeView) -> Rule:
    """Linear in either input."""
    return dataclasses.replace(broadcast(view), bilinear=True, padding="product")


@rule("Div")
def divide(view: NodeView) -> Rule:
    """Linear in the dividend (of floating point numbers); padding divides nothing."""
    linear = (0,) if view.fact(0).dtype.name in _FLOAT_BITS else ()
    return dataclasses.replace(broadcast(view), linear=linear, padding="moves", divisor=1)


@rule("Mod")
def modulo(view: NodeView) -> Rule:
    """Padding divides nothing."""
    return dataclasses.replace(broadcast(view), padding="moves", divisor=1)


@rule("Where")
def where(view: NodeView) -> Rule:
    """Jointly linear in the two values."""
    return dataclasses.replace(broadcast(view), linear=(1, 2), padding="finite")


@rule("Cast")
def cast(view: NodeView) -> Rule:
    """Linear where no precision is lost."""
    source, target = view.fact(0).dtype, view.facts[view.node.outputs[0]].dtype
    exact = source == target or _FLOAT_BITS.get(source.name, 64) < _FLOAT_BITS.get(target.name, 0)
    linear = (0,) if exact and source.name in _FLOAT_BITS else ()
    return dataclasses.replace(broadcast(view), linear=linear, padding="moves")


@rule("CastLike")
def cast_like(view: NodeView) -> Rule:
    """A Cast that takes its type from the second input, of which nothing else matters."""
    names = words(view.rank(0))
    return dataclasses.replace(
        cast(view), text=f"{spell(names, ['.'] * view.rank(1))} -> {spell(names)}", padding_ports=(0,)
    )


@rule("Dropout")
def dropout(view: NodeView) -> Rule:
    """The identity in inference (training is refused), with a mask of ones."""
    names = words(view.rank(0))
    rest = [None if v is None else ["*"] * len(view.facts[v].shape) for v in view.node.inputs[1:]]
    outputs = [names] * len(view.node.outputs)
    alone = len(outputs) == 1
    text = f"{spell(names, *rest)} -> {spell(*outputs)}"
    return Rule(text=text, linear=(0,) if alone else (), padding="moves" if alone else "finite", padding_ports=(0,))


@rule("QLinearAdd", "QLinearMul", "QLinearSigmoid", "QLinearLeakyRelu", domain=MICROSOFT)
def quantized_elementwise(view: NodeView) -> Rule:
    """Codes with one scale for all of them: each element is computed alone."""
    return dataclasses.replace(broadcast(view), padding="finite")


@shape_rule("QLinearAdd", "QLinearMul")
def _quantized_elementwise_shape(
    _: ir.Node, inputs: Sequence[Fact | None]
) -> list[tuple[ir.DataType, tuple[int, ...]]]:
    a, b = inputs[0], inputs[3]
    assert a is not None
    assert b is not None
    return [(a.dtype, np.broadcast_shapes(a.shape, b.shape))]


@rule("QLinearWhere", domain=MICROSOFT)
def quantized_where(view: NodeView) -> Rule:
    """Where of codes, which are brought to one scale."""
    return dataclasses.replace(broadcast(view), padding="finite")


@shape_rule("QLinearWhere")
def _quantized_where_shape(_: ir.Node, inputs: Sequence[Fact | None]) -> list[tuple[ir.DataType, tuple[int, ...]]]:
    condition, a, b = inputs[0], inputs[1], inputs[4]
    assert condition is not None
    assert a is not None
    assert b is not None
    return [(a.dtype, np.broadcast_shapes(condition.shape, a.shape, b.shape))]
