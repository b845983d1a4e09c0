"""Evaluate small tensors (shape arithmetic) with numpy: functions of an op's attributes and inputs.

ONNX's operator definitions are the source: https://onnx.ai/onnx/operators/. Optional inputs that are absent are None.
"""

# ruff: noqa: D103  (each function does what ONNX defines for the op of its name)

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Array = npt.NDArray[Any]
Attributes = dict[str, Any]
Evaluator = Callable[[Attributes, Sequence[Array | None]], Array | tuple[Array, ...]]
"""Computes the outputs from attributes and inputs."""
ShapeEvaluator = Callable[[Attributes, tuple[int, ...]], Array]
"""Computes the output from attributes and the shape of input 0."""
SizeFunction = Callable[[Sequence[Array]], float]
"""Computes the number of elements that an op makes from the inputs that are present."""


def _ints(value: Array | None) -> tuple[int, ...]:
    assert value is not None
    return tuple(int(v) for v in np.atleast_1d(value))


def _axes(attributes: Attributes, inputs: Sequence[Array | None]) -> tuple[int, ...] | None:
    """The axes of an op that takes them as an attribute in old opsets and as input 1 in new ones."""
    if len(inputs) > 1 and inputs[1] is not None:
        return _ints(inputs[1])
    axes = attributes.get("axes")
    return None if axes is None else tuple(axes)


def unsqueeze(attributes: Attributes, inputs: Sequence[Array | None]) -> Array:
    axes = _axes(attributes, inputs)
    assert axes is not None
    return np.expand_dims(_array(inputs[0]), axes)


def squeeze(attributes: Attributes, inputs: Sequence[Array | None]) -> Array:
    return np.squeeze(_array(inputs[0]), _axes(attributes, inputs))


def _array(value: Array | None) -> Array:
    assert value is not None
    return value


def reshape(attributes: Attributes, inputs: Sequence[Array | None]) -> Array:
    data, shape = _array(inputs[0]), list(_ints(inputs[1]))
    if not attributes.get("allowzero", 0):
        shape = [data.shape[i] if s == 0 else s for i, s in enumerate(shape)]
    return data.reshape(shape)


def slice_(attributes: Attributes, inputs: Sequence[Array | None]) -> Array:
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


def concat(attributes: Attributes, inputs: Sequence[Array | None]) -> Array:
    return np.concatenate([_array(v) for v in inputs], axis=attributes["axis"])


def gather(attributes: Attributes, inputs: Sequence[Array | None]) -> Array:
    return np.take(_array(inputs[0]), _array(inputs[1]), axis=attributes.get("axis", 0))


def expand(_: Attributes, inputs: Sequence[Array | None]) -> Array:
    data = _array(inputs[0])
    return np.broadcast_to(data, np.broadcast_shapes(data.shape, _ints(inputs[1])))


def constant_of_shape(attributes: Attributes, inputs: Sequence[Array | None]) -> Array:
    value = attributes.get("value")
    fill = np.zeros(1, np.float32) if value is None else value.numpy()
    return np.full(_ints(inputs[0]), fill.reshape(-1)[0], dtype=fill.dtype)


def arange(_: Attributes, inputs: Sequence[Array | None]) -> Array:
    start, limit, delta = (_array(v) for v in inputs)
    return np.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


def cast(attributes: Attributes, inputs: Sequence[Array | None]) -> Array:
    return _array(inputs[0]).astype(ir.DataType(attributes["to"]).numpy())


def divide(_: Attributes, inputs: Sequence[Array | None]) -> Array:
    a, b = _array(inputs[0]), _array(inputs[1])
    if a.dtype.kind not in "iu":
        return np.asarray(a / b)
    magnitude = np.abs(a) // np.where(b == 0, 1, np.abs(b))
    return np.asarray(np.sign(a) * np.sign(b) * magnitude, dtype=a.dtype)


def mod(attributes: Attributes, inputs: Sequence[Array | None]) -> Array:
    function = np.fmod if attributes.get("fmod", 0) else np.mod
    return np.asarray(function(_array(inputs[0]), _array(inputs[1])))


def reduce(function: Callable[..., Any]) -> Evaluator:
    def evaluate(attributes: Attributes, inputs: Sequence[Array | None]) -> Array:
        axes, data = _axes(attributes, inputs), _array(inputs[0])
        if axes is None and attributes.get("noop_with_empty_axes", 0):
            return data
        result = function(data, axis=axes, keepdims=bool(attributes.get("keepdims", 1)))
        return np.asarray(result, dtype=data.dtype)

    return evaluate


def binary(function: Callable[..., Any]) -> Evaluator:
    return lambda _, inputs: np.asarray(function(_array(inputs[0]), _array(inputs[1])))


def unary(function: Callable[..., Any]) -> Evaluator:
    return lambda _, inputs: np.asarray(function(_array(inputs[0])), dtype=_array(inputs[0]).dtype)


def variadic(function: Callable[..., Any]) -> Evaluator:
    def evaluate(_: Attributes, inputs: Sequence[Array | None]) -> Array:
        result = _array(inputs[0])
        for other in inputs[1:]:
            result = np.asarray(function(result, _array(other)))
        return result

    return evaluate


def transpose(attributes: Attributes, inputs: Sequence[Array | None]) -> Array:
    return np.transpose(_array(inputs[0]), attributes.get("perm"))


def where(_: Attributes, inputs: Sequence[Array | None]) -> Array:
    condition, a, b = (_array(v) for v in inputs)
    return np.where(condition, a, b)


def split(attributes: Attributes, inputs: Sequence[Array | None]) -> tuple[Array, ...]:
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


def _axis(attributes: Attributes, array: Array, default: int) -> int:
    return int(attributes.get("axis", default)) % max(array.ndim, 1)


def arg(function: Callable[..., Any]) -> Evaluator:
    def evaluate(attributes: Attributes, inputs: Sequence[Array | None]) -> Array:
        data, last = _array(inputs[0]), bool(attributes.get("select_last_index", 0))
        axis = _axis(attributes, data, 0)
        found = function(np.flip(data, axis) if last else data, axis=axis, keepdims=bool(attributes.get("keepdims", 1)))
        return np.asarray(data.shape[axis] - 1 - found if last else found, dtype=np.int64)

    return evaluate


def cast_like(_: Attributes, inputs: Sequence[Array | None]) -> Array:
    return _array(inputs[0]).astype(_array(inputs[1]).dtype)


def clip(attributes: Attributes, inputs: Sequence[Array | None]) -> Array:
    data = _array(inputs[0])
    low, high = [*inputs[1:], None, None][:2]
    low = attributes.get("min") if low is None else low
    high = attributes.get("max") if high is None else high
    data = data if low is None else np.maximum(data, np.asarray(low, dtype=data.dtype))
    return data if high is None else np.minimum(data, np.asarray(high, dtype=data.dtype))


def compress(attributes: Attributes, inputs: Sequence[Array | None]) -> Array:
    data, condition = _array(inputs[0]), _array(inputs[1])
    return np.compress(condition, data, axis=attributes.get("axis"))


def cumulative_sum(attributes: Attributes, inputs: Sequence[Array | None]) -> Array:
    data, axis = _array(inputs[0]), int(_array(inputs[1]).item())
    data = np.flip(data, axis) if attributes.get("reverse", 0) else data
    total = np.cumsum(data, axis=axis, dtype=data.dtype)
    total = total - data if attributes.get("exclusive", 0) else total
    return np.flip(total, axis) if attributes.get("reverse", 0) else total


def eye_like(attributes: Attributes, inputs: Sequence[Array | None]) -> Array:
    data = _array(inputs[0])
    dtype = ir.DataType(attributes["dtype"]).numpy() if "dtype" in attributes else data.dtype
    rows, columns = data.shape
    return np.asarray(np.eye(rows, columns, k=attributes.get("k", 0)), dtype=dtype)


def flatten(attributes: Attributes, inputs: Sequence[Array | None]) -> Array:
    data = _array(inputs[0])
    axis = attributes.get("axis", 1)
    return data.reshape(int(np.prod(data.shape[: axis if axis >= 0 else axis + data.ndim])), -1)


def gather_elements(attributes: Attributes, inputs: Sequence[Array | None]) -> Array:
    data, indices = _array(inputs[0]), _array(inputs[1])
    return np.take_along_axis(_cropped(data, indices, _axis(attributes, data, 0)), indices, _axis(attributes, data, 0))


def _cropped(data: Array, indices: Array, axis: int) -> Array:
    """The part of `data` that indices along `axis` can reach."""
    return data[tuple(slice(None) if d == axis else slice(size) for d, size in enumerate(indices.shape))]


def gather_nd(attributes: Attributes, inputs: Sequence[Array | None]) -> Array:
    data, indices = _array(inputs[0]), _array(inputs[1])
    batch = attributes.get("batch_dims", 0)
    grid = np.ogrid[tuple(slice(size) for size in indices.shape[:batch])] if batch else ()
    own = [g.reshape(g.shape + (1,) * (indices.ndim - 1 - batch)) for g in grid]
    return np.asarray(data[(*own, *np.moveaxis(indices, -1, 0))])


def mean(attributes: Attributes, inputs: Sequence[Array | None]) -> Array:
    total = variadic(np.add)(attributes, inputs)
    assert not isinstance(total, tuple)
    return np.asarray(total / len(inputs), dtype=total.dtype)


def one_hot(attributes: Attributes, inputs: Sequence[Array | None]) -> Array:
    indices, values = _array(inputs[0]), _array(inputs[2])
    depth = int(_array(inputs[1]).item())
    axis = attributes.get("axis", -1)
    wrapped = np.where(indices < 0, indices + depth, indices).astype(np.int64)
    hot = np.expand_dims(wrapped, axis) == np.arange(depth).reshape(
        [-1] + [1] * ((indices.ndim - axis) if axis >= 0 else -1 - axis)
    )
    return np.asarray(np.where(hot, values[1], values[0]))


def pad(attributes: Attributes, inputs: Sequence[Array | None]) -> Array:
    data, mode = _array(inputs[0]), attributes.get("mode", "constant")
    pads = attributes.get("pads") if len(inputs) < 2 else _ints(inputs[1])
    value, axes = [*inputs[2:], None, None][:2]
    assert pads is not None
    widths = [(0, 0)] * data.ndim
    for i, place in enumerate(range(data.ndim) if axes is None else _ints(axes)):
        widths[place] = (pads[i], pads[len(pads) // 2 + i])
    cut = tuple(
        slice(max(-before, 0), size - max(-after, 0)) for size, (before, after) in zip(data.shape, widths, strict=True)
    )
    grown = [(max(before, 0), max(after, 0)) for before, after in widths]
    match mode:
        case "reflect":
            return np.pad(data[cut], grown, mode="reflect")
        case "edge":
            return np.pad(data[cut], grown, mode="edge")
        case "wrap":
            return np.pad(data[cut], grown, mode="wrap")
    fill = attributes.get("value", 0) if value is None else value.item()
    return np.pad(data[cut], grown, constant_values=fill)


def scatter_elements(attributes: Attributes, inputs: Sequence[Array | None]) -> Array:
    data, indices, updates = _array(inputs[0]).copy(), _array(inputs[1]), _array(inputs[2])
    axis = _axis(attributes, data, 0)
    places = list(np.ogrid[tuple(slice(size) for size in indices.shape)])
    places[axis] = np.where(indices < 0, indices + data.shape[axis], indices)
    _combine(attributes, data, tuple(places), updates)
    return data


def scatter_nd(attributes: Attributes, inputs: Sequence[Array | None]) -> Array:
    data, indices, updates = _array(inputs[0]).copy(), _array(inputs[1]), _array(inputs[2])
    _combine(attributes, data, tuple(np.moveaxis(indices, -1, 0)), updates)
    return data


def _combine(attributes: Attributes, data: Array, places: tuple[Array, ...], updates: Array) -> None:
    """Write or accumulate updates at places, one after another."""
    how = {"add": np.add, "mul": np.multiply, "max": np.maximum, "min": np.minimum}
    reduction = attributes.get("reduction", "none")
    if reduction == "none":
        data[places] = updates
    else:
        how[reduction].at(data, places, updates)


def tile(_: Attributes, inputs: Sequence[Array | None]) -> Array:
    return np.tile(_array(inputs[0]), _ints(inputs[1]))


def trilu(attributes: Attributes, inputs: Sequence[Array | None]) -> Array:
    k = int(_array(inputs[1]).item()) if len(inputs) > 1 and inputs[1] is not None else 0
    return (np.triu if attributes.get("upper", 1) else np.tril)(_array(inputs[0]), k)


def quiet(evaluator: Evaluator) -> Evaluator:
    """The evaluator without numpy's warnings: ONNX computes log(0) and 1/0 silently.

    What numpy cannot do, as broadcast more than 32 dimensions, is a ValueError as what it refuses is.
    """

    def evaluate(attributes: Attributes, inputs: Sequence[Array | None]) -> Array | tuple[Array, ...]:
        try:
            with np.errstate(all="ignore"):
                return evaluator(attributes, inputs)
        except RuntimeError as error:
            raise ValueError(f"numpy: {error}") from error

    return evaluate


def is_nan(_: Attributes, inputs: Sequence[Array | None]) -> Array:
    return np.isnan(_array(inputs[0]))


def nonzero(_: Attributes, inputs: Sequence[Array | None]) -> Array:
    return np.array(np.nonzero(_array(inputs[0])), dtype=np.int64)


def power(_: Attributes, inputs: Sequence[Array | None]) -> Array:
    return np.power(_array(inputs[0]), _array(inputs[1])).astype(_array(inputs[0]).dtype)


def shape(attributes: Attributes, of: tuple[int, ...]) -> Array:
    return np.array(of, dtype=np.int64)[attributes.get("start", 0) : attributes.get("end")]


def size(_: Attributes, of: tuple[int, ...]) -> Array:
    return np.asarray(np.prod(of, dtype=np.int64))


# -- numbers of elements: in floating point, because they may exceed an integer's range -----------------------------


def made_of_target(inputs: Sequence[Array]) -> float:
    return float(np.prod(inputs[-1].astype(np.float64)))


def made_by_range(inputs: Sequence[Array]) -> float:
    start, limit, delta = (float(value.item()) for value in inputs)
    return abs((limit - start) / delta) if delta else 0.0


def made_by_one_hot(inputs: Sequence[Array]) -> float:
    return float(inputs[0].size * inputs[1].astype(np.float64).item())


def made_by_pad(inputs: Sequence[Array]) -> float:
    data, *rest = inputs
    return float((data.size + 1) * np.prod(1 + np.abs(rest[0].astype(np.float64))) if rest else data.size)


def made_by_tile(inputs: Sequence[Array]) -> float:
    return float(inputs[0].size * np.prod(inputs[1].astype(np.float64)))
