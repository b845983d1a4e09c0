"""The collectives in memory: an AllReduce is a list of numpy additions, an AllGather a list of copies.

The sum over a group has one order whatever the number of threads or the size: neighbours in the order of ranks are
added in pairs, then neighbouring pairs, and so on: ((r0 + r1) + (r2 + r3)) + ((r4 + r5) + (r6 + r7)). Results are
therefore the same bits for any number of driver threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from furiosa_llm.runtime.ort import Array

Operation = tuple[Callable[..., Any], tuple[Any, ...]]
"""A function and its arguments; running a list of them is a whole collective without Python logic in between."""

_CHUNK_NBYTES = 128 * 1024
"""Sums go in chunks that stay in a core's cache: two inputs and two results of this size."""


def run_operations(operations: Sequence[Operation]) -> None:
    """Runs `operations` in order."""
    for function, arguments in operations:
        function(*arguments)


def reduce_operations(parts: Sequence[Array], out: Array, share: tuple[int, int] = (0, 1)) -> list[Operation]:
    """The additions that put the sum of `parts`, in the order of ranks, into `out`.

    All arrays have one shape and type and are C-contiguous; `out` overlaps no part. `share` (index, count) selects one
    of `count` pieces of the elements, for as many threads.
    """
    index, count = share
    flat_parts = [part.reshape(-1) for part in parts]
    flat_out = out.reshape(-1)
    begin, end = flat_out.size * index // count, flat_out.size * (index + 1) // count
    chunk = max(1, _CHUNK_NBYTES // flat_out.itemsize)
    # Sixteen-bit partial sums are added in 32 bits and rounded once.
    narrow = flat_out.dtype.itemsize == 2 and flat_out.dtype.kind not in "iu"
    accumulator = np.dtype(np.float32) if narrow else flat_out.dtype
    depth = (len(parts) - 1).bit_length() + (1 if narrow else 0)
    scratch = [np.empty(min(chunk, end - begin), dtype=accumulator) for _ in range(depth)]
    operations: list[Operation] = []
    for start in range(begin, end, chunk):
        stop = min(start + chunk, end)
        pieces = [part[start:stop] for part in flat_parts]
        free = [buffer[: stop - start] for buffer in scratch]
        target = flat_out[start:stop]
        if narrow:
            total = _tree(pieces, free[0], free[1:], _add_wide, operations)
            operations.append((_round_into, (target, total)))
        else:
            total = _tree(pieces, target, free, np.add, operations)
            if total is not target:
                operations.append((np.copyto, (target, total)))
    return operations


def gather_operations(part: Array, position: int, out: Array, dim: int) -> list[Operation]:
    """The copy that puts `part` at `position` of the concatenation `out` along `dim`."""
    return [(np.copyto, (gather_slice(out, position, part.shape[dim], dim), part))]


def gather_slice(out: Array, position: int, size: int, dim: int) -> Array:
    """The place in the concatenation `out` along `dim` of the part at `position`, which is `size` long."""
    index = (slice(None),) * dim + (slice(position * size, (position + 1) * size),)
    view: Array = out[index]
    return view


def _tree(
    parts: Sequence[Array],
    out: Array,
    scratch: Sequence[Array],
    add: Callable[..., Any],
    operations: list[Operation],
) -> Array:
    """Appends the additions that put the sum of `parts` into `out`; returns where it is: one part is its own sum."""
    if len(parts) == 1:
        return parts[0]
    middle = 1 << ((len(parts) - 1).bit_length() - 1)
    left = _tree(parts[:middle], out, scratch, add, operations)
    right = _tree(parts[middle:], scratch[0], scratch[1:], add, operations)
    operations.append((add, (left, right, out)))
    return out


def _add_wide(left: Array, right: Array, out: Array) -> None:
    np.add(left, right, out=out, dtype=out.dtype)


def _round_into(out: Array, accumulated: Array) -> None:
    np.copyto(out, accumulated, casting="same_kind")
