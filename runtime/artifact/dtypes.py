"""The element types that an artifact can hold: ONNX's name, numpy's type, safetensors' name, bits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class DType:
    """One element type.

    `onnx` is the name in `onnx.TensorProto.DataType`, `safetensors` the name in a safetensors header (`U8` for types
    below one byte, whose bytes are stored packed), `numpy` the type of an array of such elements in memory, and `bits`
    the width of one stored element.
    """

    onnx: str
    safetensors: str
    numpy: npt.DTypeLike
    bits: int

    def nbytes(self, shape: Sequence[int]) -> int:
        """The bytes that a packed tensor of `shape` takes; elements below one byte share bytes."""
        return -(-math.prod(shape) * self.bits // 8)


_ROWS: tuple[tuple[str, str, npt.DTypeLike, int], ...] = (
    ("FLOAT", "F32", np.float32, 32),
    ("DOUBLE", "F64", np.float64, 64),
    ("FLOAT16", "F16", np.float16, 16),
    ("BFLOAT16", "BF16", ml_dtypes.bfloat16, 16),
    ("FLOAT8E4M3FN", "F8_E4M3", ml_dtypes.float8_e4m3fn, 8),
    ("FLOAT8E5M2", "F8_E5M2", ml_dtypes.float8_e5m2, 8),
    ("BOOL", "BOOL", np.bool_, 8),
    ("INT8", "I8", np.int8, 8),
    ("INT16", "I16", np.int16, 16),
    ("INT32", "I32", np.int32, 32),
    ("INT64", "I64", np.int64, 64),
    ("UINT8", "U8", np.uint8, 8),
    ("UINT16", "U16", np.uint16, 16),
    ("UINT32", "U32", np.uint32, 32),
    ("UINT64", "U64", np.uint64, 64),
    ("INT4", "U8", ml_dtypes.int4, 4),
    ("UINT4", "U8", ml_dtypes.uint4, 4),
    ("INT2", "U8", ml_dtypes.int2, 2),
    ("UINT2", "U8", ml_dtypes.uint2, 2),
    ("FLOAT4E2M1", "U8", ml_dtypes.float4_e2m1fn, 4),
)

DTYPES: Mapping[str, DType] = MappingProxyType(
    {onnx: DType(onnx=onnx, safetensors=stored, numpy=kind, bits=bits) for onnx, stored, kind, bits in _ROWS}
)
"""Every element type that an artifact may name, by its ONNX name."""
