"""Compare a tensor's data with its type and its dimensions, without looking at the elements."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from onnx import TensorProto

from furiosa_llm.builder.errors import ModelLoadError, UnsupportedModelError
from furiosa_llm.builder.source.protobuf_scan import LeftOut
from furiosa_llm.runtime.artifact.dtypes import DTYPES

MAX_ELEMENTS = 2**40
"""The most elements of one tensor. The largest weights have some 2**32; a product of damaged sizes would overflow."""

_FIELDS: Mapping[int, tuple[str, int]] = {
    TensorProto.FLOAT: ("float_data", 1),
    TensorProto.DOUBLE: ("double_data", 1),
    TensorProto.INT64: ("int64_data", 1),
    TensorProto.UINT32: ("uint64_data", 1),
    TensorProto.UINT64: ("uint64_data", 1),
    TensorProto.COMPLEX64: ("float_data", 2),
    TensorProto.COMPLEX128: ("double_data", 2),
    TensorProto.STRING: ("string_data", 1),
}
"""Type -> the field of elements that are not in raw_data, and how many numbers make an element; the elements of all
other types lie in int32_data."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_BITS = {"COMPLEX64": 64, "COMPLEX128": 128}


def dtype_name(number: int) -> str:
    """ONNX's name for an element type."""
    known = number in TensorProto.DataType.values()
    return str(TensorProto.DataType.Name(number)) if known else f"number {number}"


def check_text(where: str, *texts: object) -> None:
    """Raise ModelLoadError for a name that no message could show; protobuf gives bytes for text that is not UTF-8."""
    for text in texts:
        if not isinstance(text, str) or _CONTROL.search(text):
            raise ModelLoadError(
                f"{where} has the name {text!r:.80}, expected UTF-8 without control characters; the file is damaged, "
                "export the model again."
            )


def check_tensor(tensor: TensorProto, where: str, *, any_type: bool = False, left_out: LeftOut | None = None) -> None:
    """Raise ModelLoadError unless the tensor's data has the length that its type and dimensions need.

    Raise UnsupportedModelError for a type that artifacts cannot hold, unless the tensor may be of `any_type`.
    `left_out` is what was left out when the tensor was read; by now it is external data.
    """
    check_text(repr(where)[1:-1], tensor.name)
    dims, dtype = list(tensor.dims), dtype_name(tensor.data_type)
    elements = math.prod(dims)
    if any(dim < 0 for dim in dims) or elements > MAX_ELEMENTS:
        raise ModelLoadError(
            f"{where} has the dimensions {dims}, expected none below 0 and at most {MAX_ELEMENTS} elements; "
            "the file is damaged, export the model again."
        )
    if dtype not in DTYPES and not (any_type and (dtype == "STRING" or dtype in _BITS)):
        raise UnsupportedModelError(
            f"{where} has elements of type {dtype}, expected one of {', '.join(DTYPES)}; export the model again."
        )
    if tensor.HasField("segment"):
        raise UnsupportedModelError(f"{where} is stored in segments, expected it in one piece; save the model again.")
    if left_out is not None:
        expected = elements if left_out.field != "raw_data" else _nbytes(elements, dtype)
        _check_length(where, left_out.entries, expected, _unit(left_out.field, dtype, dims))
    elif tensor.data_location == TensorProto.EXTERNAL:
        _check_external(tensor, where, dtype)
    elif dtype == "STRING" or not tensor.HasField("raw_data"):
        _check_field(tensor, where, elements, dtype)
    else:
        _check_length(where, len(tensor.raw_data), _nbytes(elements, dtype), _unit("raw_data", dtype, dims))


def _check_external(tensor: TensorProto, where: str, dtype: str) -> None:
    if dtype not in DTYPES:
        raise UnsupportedModelError(f"{where} is of type {dtype} and external, expected its data in the .onnx file.")
    entries: dict[str, str] = {}
    for entry in tensor.external_data:
        if not isinstance(entry.key, str) or not isinstance(entry.value, str) or entry.key in entries:
            raise ModelLoadError(f"{where} has external data {entry.key!r:.40} twice or not as text; export it again.")
        entries[entry.key] = entry.value
    if not entries.get("location"):
        raise ModelLoadError(f"{where} is external, but does not say in which file; export the model again.")
    if _CONTROL.search(entries["location"]):
        raise ModelLoadError(
            f"{where} has its data in {entries['location']!r:.80}, a name with control characters; export it again."
        )
    for key in ("offset", "length"):
        text = entries.get(key, "0")
        if not (text.isascii() and text.isdigit() and int(text[:20]) < 2**62 and len(text) < 20):
            raise ModelLoadError(
                f"{where} has the {key} {text!r:.40}, expected a number of bytes; the file is damaged, export it again."
            )


def _check_field(tensor: TensorProto, where: str, elements: int, dtype: str) -> None:
    field, numbers = _FIELDS.get(tensor.data_type, ("int32_data", 1))
    bits = _bits(dtype)
    per_entry = 8 // bits if bits < 8 else 1
    expected = -(-elements // per_entry) * numbers
    _check_length(where, len(getattr(tensor, field)), expected, _unit(field, dtype, list(tensor.dims)))


def _unit(field: str, dtype: str, dims: list[int]) -> str:
    return f"{'bytes' if field == 'raw_data' else f'entries of {field}'} for {dtype} {dims}"


def _check_length(where: str, found: int, expected: int, what: str) -> None:
    if found != expected:
        raise ModelLoadError(f"{where} has {found} {what}, expected {expected}; the file is damaged, export it again.")


def _nbytes(elements: int, dtype: str) -> int:
    return -(-elements * _bits(dtype) // 8)


def _bits(dtype: str) -> int:
    return DTYPES[dtype].bits if dtype in DTYPES else _BITS.get(dtype, 8)
