"""By how much two tensors of one type and shape differ."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from furiosa_llm.runtime.artifact.dtypes import DTYPES, DType

Packed = npt.NDArray[np.uint8]
Numbers = npt.NDArray[np.float64]

Kind = tuple[str, tuple[int, ...]]
"""Type and shape."""

_CHUNK_NBYTES = 4 * 2**20
"""Of elements of a byte or more, each of which becomes a float64; smaller elements are taken fewer bytes at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """An original that differs: `dtype` and `shape` of both sides, and by how much if those are equal.

    `num_different` elements have other bits. `greatest` is the greatest absolute difference of two finite elements, and
    `relative` that divided by the greatest finite magnitude on either side. All three are None where types or shapes
    differ, and for text and complex numbers.
    """

    name: str
    dtype: tuple[str, str]
    shape: tuple[tuple[int, ...], tuple[int, ...]]
    num_different: int | None
    greatest: float | None
    relative: float | None


def unlike(name: str, a: Kind, b: Kind) -> Difference:
    """Tensors whose elements cannot be compared."""
    return Difference(
        name=name, dtype=(a[0], b[0]), shape=(a[1], b[1]), num_different=None, greatest=None, relative=None
    )


def difference(name: str, kind: Kind, a: memoryview, b: memoryview) -> Difference:
    """Compare the packed bytes of two tensors of one type and shape."""
    dtype = DTYPES.get(kind[0])
    if dtype is None:
        return unlike(name, kind, kind)
    num_different, greatest, magnitude = 0, 0.0, 0.0
    ours, theirs = np.frombuffer(a, np.uint8), np.frombuffer(b, np.uint8)
    for one, other, are_different in _chunks(ours, theirs, dtype):
        num_different += int(are_different.sum())
        magnitude = max(magnitude, _greatest(one), _greatest(other))
        with np.errstate(invalid="ignore", over="ignore"):  # infinities are no finite difference
            greatest = max(greatest, _greatest(one - other))
    return Difference(
        name=name,
        dtype=(kind[0], kind[0]),
        shape=(kind[1], kind[1]),
        num_different=num_different,
        greatest=greatest,
        relative=greatest / magnitude if magnitude else 0.0,
    )


def _chunks(a: Packed, b: Packed, dtype: DType) -> Iterator[tuple[Numbers, Numbers, npt.NDArray[np.bool_]]]:
    """Elements as numbers, and which of them have different bits; unused bits of a last byte are zero on both sides."""
    step = _CHUNK_NBYTES if dtype.bits >= 8 else _CHUNK_NBYTES * dtype.bits // 64
    for start in range(0, a.size, step):
        ours, theirs = (_codes(side[start : start + step], dtype.bits) for side in (a, b))
        yield _numbers(ours, dtype), _numbers(theirs, dtype), (ours != theirs).any(axis=1)


def _codes(data: Packed, bits: int) -> npt.NDArray[np.uint8]:
    """The bytes of each element, `[elements, bytes]`; the bits of those below a byte in a byte of their own."""
    if bits >= 8:
        return data.reshape(-1, bits // 8)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return ((data[:, None] >> shifts) & np.uint8(2**bits - 1)).reshape(-1, 1)


def _numbers(codes: npt.NDArray[np.uint8], dtype: DType) -> Numbers:
    return np.ascontiguousarray(codes).view(dtype.numpy).reshape(-1).astype(np.float64)


def _greatest(numbers: Numbers) -> float:
    return float(np.abs(numbers[np.isfinite(numbers)]).max(initial=0.0))
