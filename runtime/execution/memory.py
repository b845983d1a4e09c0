"""Where the values that cross sections lie in a lane's memory: one block per lane, reused as values die."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from furiosa_llm.runtime.artifact.dtypes import DTYPES, Array
from furiosa_llm.runtime.program.lanes import Lanes, parts_of

_ALIGNMENT = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Lifetime:
    """The sections in which a value is touched: written first in section `first`, read last in section `last`.

    `lanes` have memory for it, and `readers` is how many segments read it.
    """

    first: int
    last: int
    lanes: frozenset[int] = frozenset()
    readers: int = 0


def lifetimes(lanes: Lanes) -> dict[str, Lifetime]:
    """The lifetime of every value that a segment or an exchange makes; what the caller reads lives to the end."""
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    owners: dict[str, set[int]] = {}
    readers: Counter[str] = Counter()
    for index, section in enumerate(lanes.sections):
        made = [(name, lane) for lane, s in enumerate(section.segments) if s is not None for name in s.outputs]
        made += [(exchange.out, lane) for exchange in section.exchanges for lane in exchange.lanes]
        for name, lane in made:
            first.setdefault(name, index)
            last[name] = index
            owners.setdefault(name, set()).add(lane)
        readers.update(name for s in section.segments if s is not None for name in s.inputs)
        read = {name for s in section.segments if s is not None for name in s.inputs}
        read |= {part.name for exchange in section.exchanges for part in parts_of(exchange)}
        last.update({name: index for name in read if name in first})
    for name in lanes.program.outputs:
        last.update({lanes.name(rank, name): len(lanes.sections) for rank in range(lanes.mesh.size)})
    return {
        name: Lifetime(first=first[name], last=last[name], lanes=frozenset(owners[name]), readers=readers[name])
        for name in first
    }


def padded(nbytes: int) -> int:
    """The bytes that an array of `nbytes` takes in a block."""
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def place(values: Iterable[tuple[str, int, Lifetime]]) -> tuple[dict[str, int], int]:
    """Byte offsets for `(name, nbytes, lifetime)` triples, and the size of the block that holds them.

    Two values share bytes only if the later one is first touched two sections or more after the last touch of the
    earlier one: no thread passes the barrier of the section in between before all threads are done with the earlier
    value: so values that other threads read are safe too.
    """
    offsets: dict[str, int] = {}
    slots: dict[int, list[tuple[int, int]]] = {}
    end = 0
    for name, nbytes, lifetime in sorted(values, key=lambda value: value[2].first):
        size = padded(nbytes)
        candidates = slots.setdefault(size, [])
        index = next((i for i, (_, last) in enumerate(candidates) if last + 2 <= lifetime.first), None)
        if index is None:
            offsets[name], end = end, end + size
        else:
            offsets[name] = candidates.pop(index)[0]
        candidates.append((offsets[name], lifetime.last))
    return offsets, end


class Block:
    """A block of memory that arrays are cut from: zeros at first, and pages that are never touched take no memory."""

    __slots__ = ("_bytes",)

    def __init__(self, nbytes: int) -> None:
        raw = np.zeros(nbytes + _ALIGNMENT, dtype=np.uint8)
        start = -raw.ctypes.data % _ALIGNMENT
        self._bytes = raw[start : start + nbytes]

    @classmethod
    def over(cls, memory: npt.NDArray[np.uint8]) -> Block:
        """A block over `memory` of somebody else's, which begins at a multiple of 64 bytes."""
        block = cls.__new__(cls)
        block._bytes = memory
        return block

    @property
    def nbytes(self) -> int:
        """The size of the block."""
        return self._bytes.size

    def array(self, dtype: str, shape: tuple[int, ...], offset: int = 0) -> Array:
        """The array of ONNX type `dtype` and `shape` that begins `offset` bytes into the block."""
        kind = np.dtype(DTYPES[dtype].numpy)
        nbytes = array_nbytes(dtype, shape)
        return self._bytes[offset : offset + nbytes].view(kind).reshape(shape)


def array_nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """The bytes of an array in memory, where every element takes at least one."""
    count = 1
    for size in shape:
        count *= size
    return count * np.dtype(DTYPES[dtype].numpy).itemsize
