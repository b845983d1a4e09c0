"""Nodes named as torch's tracing exporter names them, and the idioms that tracing leaves in a graph.

Traced graphs hold no shape constants of their own: every size is read back by Shape and Gather, put together by Concat,
and a `-1` in a target shape of `expand` is replaced through ConstantOfShape, Mul, Equal and Where. Each use of a
constant has a Constant node of its own.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto, numpy_helper

from furiosa_llm.example.llama.onnx_writer import ModelWriter

END = np.iinfo(np.int64).max
"""Slice end that means "to the end"."""


class TorchScope:
    """A module of the traced model, such as `/model/layers.0/self_attn`; names count up per operation in it."""

    def __init__(self, writer: ModelWriter, path: str) -> None:
        self._writer = writer
        self._path = path
        self._counts: Counter[str] = Counter()

    def op(self, op_type: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        """Appends a node named after this scope; `output` overrides the value's name (graph outputs need theirs)."""
        count = self._counts[op_type]
        self._counts[op_type] += 1
        name = f"{self._path}/{op_type}_{count}" if count else f"{self._path}/{op_type}"
        return self._writer.node(op_type, inputs, [output or f"{name}_output_0"], name=name, **attributes)

    def constant(self, values: npt.NDArray[Any]) -> str:
        """A Constant node."""
        return self.op("Constant", value=numpy_helper.from_array(values))

    def int64(self, value: int) -> str:
        """A scalar int64 constant."""
        return self.constant(np.array(value, dtype=np.int64))

    def axes(self, *values: int) -> str:
        """A one-dimensional int64 constant."""
        return self.constant(np.array(values, dtype=np.int64))

    def float32(self, value: float) -> str:
        """A scalar float32 constant."""
        return self.constant(np.array(value, dtype=np.float32))

    def size(self, value: str, dim: int) -> str:
        """The size of dimension `dim` of `value`, an int64 scalar."""
        return self.op("Gather", self.op("Shape", value), self.int64(dim), axis=0)

    def unsqueeze(self, value: str, *dims: int) -> str:
        """`value` with a new dimension of size 1 at each of `dims` in turn, one node each."""
        for dim in dims:
            value = self.op("Unsqueeze", value, self.axes(dim))
        return value

    def shape(self, *sizes: str | int) -> str:
        """A target shape from int64 scalars (value names) and constants."""
        parts = [self.axes(size) if isinstance(size, int) else self.unsqueeze(size, 0) for size in sizes]
        return self.op("Concat", *parts, axis=0)

    def reshape(self, value: str, shape: str) -> str:
        """`value` in the shape that `shape` holds."""
        return self.op("Reshape", value, shape, allowzero=0)

    def expand(self, value: str, shape: str) -> str:
        """`value` broadcast to `shape`, in which -1 keeps the size it has."""
        flat = self.reshape(shape, self.axes(-1))
        ones = self.op(
            "ConstantOfShape", self.op("Shape", flat), value=numpy_helper.from_array(np.array([1], dtype=np.int64))
        )
        keep = self.op("Equal", flat, self.op("Mul", ones, self.int64(-1)))
        return self.op("Expand", value, self.op("Where", keep, ones, flat))

    def slice(self, value: str, start: str | int, end: str | int, dim: int) -> str:
        """Elements `start` up to `end` of dimension `dim`; a value name stands for a one-dimensional int64 tensor."""
        bounds = [self.axes(bound) if isinstance(bound, int) else bound for bound in (start, end)]
        return self.op("Slice", value, *bounds, self.axes(dim), self.axes(1))

    def arange(self, start: str, end: str) -> str:
        """int64 numbers `start` up to `end`, [end - start]."""
        return self.op("Range", start, self.cast(end, TensorProto.INT64), self.int64(1))

    def cast(self, value: str, dtype: int) -> str:
        """`value` in the ONNX type `dtype`; tracing writes casts that change nothing, too."""
        return self.op("Cast", value, to=dtype)
