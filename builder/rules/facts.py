"""What the abstract interpreter knows of a value at one set of input sizes."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, TypeVar

import numpy.typing as npt
import onnx_ir as ir

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """What is known of a value at one set of input sizes."""

    dtype: ir.DataType
    shape: Shape
    value: npt.NDArray[Any] | None = None
    """The elements of a small tensor that does not depend on the inputs' elements; else None."""
    zero: bool = False
    """Every element is zero, whatever the inputs hold."""

    @property
    def nbytes(self) -> int:
        """The bytes of the elements, packed if they are smaller than a byte."""
        return -(-math.prod(self.shape) * self.dtype.bitwidth // 8)


Facts = dict[ir.Value, Fact]


_T = TypeVar("_T", ir.Value, Fact)


def present(value: _T | None) -> _T:
    """An input, or what is known about it, that cannot be absent, because its op requires it."""
    assert value is not None
    return value
