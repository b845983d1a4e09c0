"""Evaluate small tensors (shape arithmetic) with numpy: op type -> function of attributes and inputs.

ONNX's operator definitions are the source: https://onnx.ai/onnx/operators/. Optional inputs that are absent are None.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Array = npt.NDArray[Any]
Attributes = dict[str, Any]
Evaluator = Callable[[Attributes, Sequence[Array | None]], Array | tuple[Array, ...]]


def _ints(value: Array | None) -> tuple[int, ...]:
    assert value is not None
    return tuple(int(v) for v in np.atleast_1d(value))


def _axes(attributes: Attributes, inputs: Sequence[Array | None]) -> tuple[int, ...] | None:
    """The axes of an op that takes them as an attribute in old opsets and as input 1 in new ones."""
    if len(inputs) > 1 and inputs[1] is not None:
        return _ints(inputs[1])
    axes = attributes.get("axes")
    return None if axes is None else tuple(axes)


def _unsqueeze(attributes: Attributes, inputs: Sequence[Array | None]) -> Array:
    axes = _axes(attributes, inputs)
    assert axes is not None
    return np.expand_dims(_array(inputs[0]), axes)


def _squeeze(attributes: Attributes, inputs: Sequence[Array | None]) -> Array:
    return np.squeeze(_array(inputs[0]), _axes(attributes, inputs))


def _array(value: Array | None) -> Array:
    assert value is not None
    return value


def _reshape(attributes: Attributes, inputs: Sequence[Array | None]) -> Array:
    data, shape = _array(inputs[0]), list(_ints(inputs[1]))
    if not attributes.get("allowzero", 0):
        shape = [data.shape[i] if s == 0 else s for i, s in enumerate(shape)]
    return data.reshape(shape)


def _slice(attributes: Attributes, inputs: Sequence[Array | None]) -> Array:
    data = _array(inputs[0])
    if "starts" in attributes:
        starts, ends, axes, steps = attributes["starts"], attributes["ends"], attributes.get("axes"), None
    else:
        padded = [*inputs, None, None][:5]
        starts, ends = _ints(padded[1]), _ints(padded[2])
        axes = None if padded[3] is None else _ints(padded[3])
        steps = None if padded[4] is None else _ints(padded[4])
    index: list[slice] = [slice(None)] * data.ndim
    for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
        step = 1 if steps is None else steps[i]
        stop: int | None = None if step < 0 and end < -data.shape[axes[i] if axes is not None else i] else end
        index[axes[i] if axes is not None else i] = slice(start, stop, step)
    return data[tuple(index)]


def _concat(attributes: Attributes, inputs: Sequence[Array | None]) -> Array:
    return np.concatenate([_array(v) for v in inputs], axis=attributes["axis"])


def _gather(attributes: Attributes, inputs: Sequence[Array | None]) -> Array:
    return np.take(_array(inputs[0]), _array(inputs[1]), axis=attributes.get("axis", 0))


def _expand(_: Attributes, inputs: Sequence[Array | None]) -> Array:
    data = _array(inputs[0])
    return np.broadcast_to(data, np.broadcast_shapes(data.shape, _ints(inputs[1])))


def _constant_of_shape(attributes: Attributes, inputs: Sequence[Array | None]) -> Array:
    value = attributes.get("value")
    fill = np.zeros(1, np.float32) if value is None else value.numpy()
    return np.full(_ints(inputs[0]), fill.reshape(-1)[0], dtype=fill.dtype)


def _range(_: Attributes, inputs: Sequence[Array | None]) -> Array:
    start, limit, delta = (_array(v) for v in inputs)
    return np.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


def _cast(attributes: Attributes, inputs: Sequence[Array | None]) -> Array:
    return _array(inputs[0]).astype(ir.DataType(attributes["to"]).numpy())


def _divide(_: Attributes, inputs: Sequence[Array | None]) -> Array:
    a, b = _array(inputs[0]), _array(inputs[1])
    if a.dtype.kind not in "iu":
        return np.asarray(a / b)
    with np.errstate(all="ignore"):
        magnitude = np.abs(a) // np.where(b == 0, 1, np.abs(b))
    return np.asarray(np.sign(a) * np.sign(b) * magnitude, dtype=a.dtype)


def _mod(attributes: Attributes, inputs: Sequence[Array | None]) -> Array:
    function = np.fmod if attributes.get("fmod", 0) else np.mod
    return np.asarray(function(_array(inputs[0]), _array(inputs[1])))


def _reduce(function: Callable[..., Any]) -> Evaluator:
    def evaluate(attributes: Attributes, inputs: Sequence[Array | None]) -> Array:
        axes, data = _axes(attributes, inputs), _array(inputs[0])
        if axes is None and attributes.get("noop_with_empty_axes", 0):
            return data
        result = function(data, axis=axes, keepdims=bool(attributes.get("keepdims", 1)))
        return np.asarray(result, dtype=data.dtype)

    return evaluate


def _binary(function: Callable[..., Any]) -> Evaluator:
    return lambda _, inputs: np.asarray(function(_array(inputs[0]), _array(inputs[1])))


def _unary(function: Callable[..., Any]) -> Evaluator:
    return lambda _, inputs: np.asarray(function(_array(inputs[0])), dtype=_array(inputs[0]).dtype)


def _variadic(function: Callable[..., Any]) -> Evaluator:
    def evaluate(_: Attributes, inputs: Sequence[Array | None]) -> Array:
        result = _array(inputs[0])
        for other in inputs[1:]:
            result = np.asarray(function(result, _array(other)))
        return result

    return evaluate


def _transpose(attributes: Attributes, inputs: Sequence[Array | None]) -> Array:
    return np.transpose(_array(inputs[0]), attributes.get("perm"))


def _where(_: Attributes, inputs: Sequence[Array | None]) -> Array:
    condition, a, b = (_array(v) for v in inputs)
    return np.where(condition, a, b)


def _split(attributes: Attributes, inputs: Sequence[Array | None]) -> tuple[Array, ...]:
    data, axis = _array(inputs[0]), attributes.get("axis", 0)
    if len(inputs) > 1 and inputs[1] is not None:
        sizes: Sequence[int] = _ints(inputs[1])
    elif "split" in attributes:
        sizes = attributes["split"]
    else:
        count = attributes["num_outputs"]
        chunk = -(-data.shape[axis] // count)
        sizes = [min(chunk, data.shape[axis] - i * chunk) for i in range(count)]
    return tuple(np.split(data, np.cumsum(sizes)[:-1], axis=axis))


EVALUATORS: dict[str, Evaluator] = {
    "Abs": _unary(np.abs),
    "Add": _binary(np.add),
    "And": _binary(np.logical_and),
    "Cast": _cast,
    "Ceil": _unary(np.ceil),
    "Concat": _concat,
    "ConstantOfShape": _constant_of_shape,
    "Div": _divide,
    "Equal": _binary(np.equal),
    "Expand": _expand,
    "Floor": _unary(np.floor),
    "Gather": _gather,
    "Greater": _binary(np.greater),
    "GreaterOrEqual": _binary(np.greater_equal),
    "Identity": _unary(np.asarray),
    "Less": _binary(np.less),
    "LessOrEqual": _binary(np.less_equal),
    "Max": _variadic(np.maximum),
    "Min": _variadic(np.minimum),
    "Mod": _mod,
    "Mul": _binary(np.multiply),
    "Neg": _unary(np.negative),
    "Not": lambda _, inputs: np.logical_not(_array(inputs[0])),
    "Or": _binary(np.logical_or),
    "Range": _range,
    "ReduceMax": _reduce(np.max),
    "ReduceMin": _reduce(np.min),
    "ReduceProd": _reduce(np.prod),
    "ReduceSum": _reduce(np.sum),
    "Reshape": _reshape,
    "Slice": _slice,
    "Split": _split,
    "Sqrt": _unary(np.sqrt),
    "Squeeze": _squeeze,
    "Sub": _binary(np.subtract),
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Where": _where,
}
