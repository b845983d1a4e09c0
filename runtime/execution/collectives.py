"""The collectives in memory: an AllReduce is a list of numpy additions, an AllGather a list of copies.

The sum over a group has one order whatever the number of lanes or the size: neighbours in the order of ranks are added
in pairs, then neighbouring pairs, and so on: ((r0 + r1) + (r2 + r3)) + ((r4 + r5) + (r6 + r7)). What ranks of one lane
have of it is added in the lane's graph, the rest here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from furiosa_llm.runtime.artifact.dtypes import Array

Operation = tuple[Callable[..., Any], tuple[Any, ...]]
"""A function and its arguments; running a list of them is a whole collective without Python logic in between."""

ArraySum = Array | tuple["ArraySum", "ArraySum"]
"""Arrays, and in which order they are added: the two sums of a pair, then both."""

_CHUNK_NBYTES = 128 * 1024
"""Sums go in chunks that stay in a core's cache: two inputs and two results of this size."""


def run_operations(operations: Sequence[Operation]) -> None:
    """Runs `operations` in order."""
    for function, arguments in operations:
        function(*arguments)


def reduce_operations(total: ArraySum, out: Array, share: tuple[int, int] = (0, 1)) -> list[Operation]:
    """The additions that put `total` into `out`.

    All arrays have one shape and are C-contiguous; `out` overlaps none of the others, and is of their type, or of
    sixteen bits where they have 32: the sum is rounded once. `share` (index, count) selects one of `count` pieces of
    the elements, for as many threads.
    """
    index, count = share
    flat_out = out.reshape(-1)
    begin, end = flat_out.size * index // count, flat_out.size * (index + 1) // count
    accumulator = _first_of(total).dtype
    chunk = max(1, _CHUNK_NBYTES // accumulator.itemsize)
    narrow = accumulator != flat_out.dtype
    scratch = [np.empty(min(chunk, end - begin), dtype=accumulator) for _ in range(_depth(total) + narrow)]
    operations: list[Operation] = []
    for start in range(begin, end, chunk):
        stop = min(start + chunk, end)
        free = [buffer[: stop - start] for buffer in scratch]
        target = flat_out[start:stop]
        place = free.pop() if narrow else target
        found = _add(total, slice(start, stop), place, free, operations)
        if found is not target:
            operations.append((_copy_into, (target, found)))
    return operations


def gather_operations(part: Array, position: int, out: Array, dim: int) -> list[Operation]:
    """The copy that puts `part` at `position` of the concatenation `out` along `dim`."""
    return [(np.copyto, (gather_slice(out, position, part.shape[dim], dim), part))]


def gather_slice(out: Array, position: int, size: int, dim: int) -> Array:
    """The place in the concatenation `out` along `dim` of the part at `position`, which is `size` long."""
    index = (slice(None),) * dim + (slice(position * size, (position + 1) * size),)
    view: Array = out[index]
    return view


def _add(total: ArraySum, where: slice, out: Array, scratch: Sequence[Array], operations: list[Operation]) -> Array:
    """Appends the additions that put `total[where]` into `out`; returns where it is: one array is its own sum."""
    if not isinstance(total, tuple):
        part: Array = total.reshape(-1)[where]
        return part
    left = _add(total[0], where, out, scratch, operations)
    right = _add(total[1], where, scratch[0], scratch[1:], operations)
    operations.append((np.add, (left, right, out)))
    return out


def _first_of(total: ArraySum) -> Array:
    return _first_of(total[0]) if isinstance(total, tuple) else total


def _depth(total: ArraySum) -> int:
    return 1 + max(map(_depth, total)) if isinstance(total, tuple) else 0


def _copy_into(out: Array, found: Array) -> None:
    np.copyto(out, found, casting="same_kind")
