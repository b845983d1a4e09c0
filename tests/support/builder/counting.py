"""Arrays that count the operations numpy does on them, and ops of `onnx.reference` run on such arrays."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx.reference import ReferenceEvaluator

Array = npt.NDArray[Any]


class Counting(np.ndarray[Any, np.dtype[Any]]):
    """An array, and all that is made of it: each element that numpy computes counts, and each product twice."""

    flops = 0
    """Of all arrays since it was last set to zero."""

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, out: Any = None, **options: Any) -> Any:
        plain = [_plain(array) for array in inputs]
        if out is not None:
            options["out"] = tuple(_plain(array) for array in out)
        result = getattr(ufunc, method)(*plain, **options)
        if method == "__call__":
            _count(math.prod(np.shape(result)) * (2 * plain[0].shape[-1] if ufunc is np.matmul else 1))
        else:
            _count(np.size(plain[0]))
        return _counting(result)

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if func is np.dot:
            a, b = (np.asarray(_plain(array)) for array in args)
            result = np.dot(a, b)
            _count(result.size * (2 * a.shape[-1] if a.ndim and b.ndim else 1))
            return _counting(result)
        if func is np.einsum:
            return self._einsum(*args)
        result = super().__array_function__(func, types, args, kwargs)
        return _counting(result) if type(result) is np.ndarray else result

    def _einsum(self, equation: str, *operands: Any) -> Any:
        plain = [_plain(array) for array in operands]
        result = np.einsum(equation, *plain)
        everything = np.einsum_path(equation, *plain, optimize=False)[1]
        (naive,) = (line for line in everything.splitlines() if "Naive FLOP count" in line)
        _count(int(float(naive.split()[-1])))
        return _counting(result)


def _count(flops: int) -> None:
    Counting.flops += flops


def _plain(array: Any) -> Any:
    return array.view(np.ndarray) if isinstance(array, Counting) else array


def _counting(result: Any) -> Any:
    return np.asarray(result).view(Counting)


def values_of(proto: onnx.ModelProto, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Every value of a model, by `onnx.reference`."""
    found = ReferenceEvaluator(proto).run(None, dict(feeds), intermediate=True)
    assert isinstance(found, dict)
    return found


def counted_flops(proto: onnx.ModelProto, node: onnx.NodeProto, values: Mapping[str, Array]) -> int:
    """The operations that `onnx.reference` does for a node; of int64, which holds sizes and positions, none."""
    names = [name for name in dict.fromkeys(node.input) if name]
    empty = onnx.TypeProto()
    inputs = [onnx.helper.make_value_info(name, empty) for name in names]
    outputs = [onnx.helper.make_value_info(name, empty) for name in node.output if name]
    graph = onnx.helper.make_graph([node], "one", inputs, outputs)
    evaluator = ReferenceEvaluator(onnx.helper.make_model(graph, opset_imports=proto.opset_import))
    Counting.flops = 0
    arrays = {name: np.array(values[name]) for name in names}
    evaluator.run(None, {name: a if a.dtype == np.int64 else _counting(a) for name, a in arrays.items()})
    return Counting.flops
