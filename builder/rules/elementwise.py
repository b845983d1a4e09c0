"""Elementwise ops: dimensions are aligned from the right, and one of size 1 is broadcast."""

from __future__ import annotations

import dataclasses

from furiosa_llm.builder.rule import Rule
from furiosa_llm.builder.rules.registry import MICROSOFT, NodeView, rule, spell, words

# fmt: off
_POINTWISE = (
    "Abs", "Acos", "And", "Asin", "Atan", "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "Ceil",
    "Celu", "Clip", "Cos", "Cosh", "Elu", "Equal", "Erf", "Exp", "Floor", "Gelu", "Greater", "GreaterOrEqual",
    "HardSigmoid", "HardSwish", "IsInf", "IsNaN", "LeakyRelu", "Less", "LessOrEqual", "Log", "Max", "Min", "Mish",
    "Mod", "Not", "Or", "PRelu", "Pow", "Reciprocal", "Relu", "Round", "Selu", "Sigmoid", "Sign", "Sin", "Sinh",
    "Softplus", "Softsign", "Sqrt", "Swish", "Tan", "Tanh", "ThresholdedRelu", "Xor",
)
# fmt: on
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
    return broadcast(view)


@rule("Gelu", "QuickGelu", "FastGelu", "BiasGelu", domain=MICROSOFT)
def activation(view: NodeView) -> Rule:
    """Onnxruntime's activations, with an optional bias."""
    return broadcast(view)


@rule("Identity", "Neg")
def negate(view: NodeView) -> Rule:
    """Linear in the only input."""
    return dataclasses.replace(broadcast(view), linear=(0,))


@rule("Add", "Sub", "Sum", "Mean")
def add(view: NodeView) -> Rule:
    """Jointly linear in all inputs."""
    return dataclasses.replace(broadcast(view), linear=tuple(range(len(view.node.inputs))))


@rule("Mul")
def multiply(view: NodeView) -> Rule:
    """Linear in either input."""
    return dataclasses.replace(broadcast(view), bilinear=True)


@rule("Div")
def divide(view: NodeView) -> Rule:
    """Linear in the dividend (of floating point numbers)."""
    linear = (0,) if view.fact(0).dtype.name in _FLOAT_BITS else ()
    return dataclasses.replace(broadcast(view), linear=linear)


@rule("Where")
def where(view: NodeView) -> Rule:
    """Jointly linear in the two values."""
    return dataclasses.replace(broadcast(view), linear=(1, 2))


@rule("Cast")
def cast(view: NodeView) -> Rule:
    """Linear where no precision is lost."""
    source = _FLOAT_BITS.get(view.fact(0).dtype.name, 0)
    target = _FLOAT_BITS.get(view.facts[view.node.outputs[0]].dtype.name, -1)
    return dataclasses.replace(broadcast(view), linear=(0,) if 0 < source <= target else ())
