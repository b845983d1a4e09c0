"""Cut weights into the shards that the artifact stores, from packed bytes to packed bytes, a piece at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from furiosa_llm.builder.lower.program_builder import ShardedTensor
from furiosa_llm.runtime.artifact.layout import Mesh, axes_of, index_map

Array = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]
Indices = npt.NDArray[np.int64]

PIECE_NBYTES = 2**20
"""About how many bytes of a shard are put together at once: few enough to stay in a core's cache."""

_MOST_RUNS = 4096
"""With more runs of indices than this, one call of `take` is faster than a copy for each run."""


def num_shards(tensor: ShardedTensor, mesh: Mesh) -> int:
    """How many distinct shards a tensor has."""
    return mesh.parts(tensor.shard_axes)


def cut_shard(tensor: ShardedTensor, data: Bytes | None, mesh: Mesh, position: int) -> Iterator[Bytes]:
    """Shard `position` along the tensor's `shard_axes` as it is stored, zeros where it is padding.

    Args:
        tensor: The stored tensor.
        data: All bytes of its source, packed as ONNX packs them; None for a tensor that the builder made.
        mesh: The ranks.
        position: Which shard, counted from 0.

    Yields:
        The shard's bytes in order, `[n]` each; views of `data` where the shard lies there in one run.
    """
    if tensor.source is None:
        assert tensor.made is not None
        yield _flat(np.asarray(tensor.made()[position]))
        return
    assert data is not None
    shape = tuple(int(size) for size in tensor.source.shape.numpy())
    maps = _maps(tensor, mesh, position)
    bits = tensor.dtype.bitwidth
    if bits >= 8:
        yield from _pieces(data.view(f"u{bits // 8}").reshape(shape), maps)
        return
    per_byte = 8 // bits
    whole_bytes = _byte_map(shape, maps, per_byte)
    if whole_bytes is not None:
        yield from _pieces(data.reshape(*shape[:-1], shape[-1] // per_byte), [*maps[:-1], whole_bytes])
        return
    # These elements share bytes with elements of other ranks, so they are unpacked to one byte each.
    elements = _unpacked(data, bits, math.prod(shape)).reshape(shape)
    packed = _packed(np.concatenate([*_pieces(elements, maps), np.empty(0, np.uint8)]), bits)
    yield from (packed[start : start + PIECE_NBYTES] for start in range(0, len(packed), PIECE_NBYTES))


def is_in_order(tensor: ShardedTensor, mesh: Mesh) -> bool:
    """Whether all shards, one after the other, are the source's own bytes: nothing moved, nothing padded."""
    if tensor.source is None or tensor.layout is None or tensor.part is not None or tensor.dtype.bitwidth < 8:
        return False
    split = [d for d, dim in enumerate(tensor.layout) if axes_of(dim)]
    if not split:
        return True
    shape = tuple(int(size) for size in tensor.source.shape.numpy())
    d = split[0]
    if len(split) > 1 or math.prod(shape[:d]) != 1:
        return False
    found = np.concatenate([_maps(tensor, mesh, position)[d] for position in range(num_shards(tensor, mesh))])
    return np.array_equal(found, np.arange(shape[d]))


def _maps(tensor: ShardedTensor, mesh: Mesh, position: int) -> list[Indices]:
    """For each dimension, the source's index of each local index; -1 is padding."""
    assert tensor.layout is not None
    rank = next(r for r in range(mesh.size) if mesh.position(r, tensor.shard_axes) == position)
    maps = [index_map(dim, mesh, rank) for dim in tensor.layout]
    if tensor.part is not None:
        d = tensor.part.dim
        maps[d] = np.where(maps[d] < 0, -1, maps[d] + tensor.part.start)
    return maps


def _pieces(array: Array, maps: Sequence[Indices]) -> Iterator[Bytes]:
    """`array` at the indices of each dimension, in row-major order, as bytes."""
    if not maps:
        yield _flat(array)
        return
    row_nbytes = array.itemsize * math.prod(len(m) for m in maps[1:])
    if row_nbytes == 0:
        return
    if row_nbytes > PIECE_NBYTES and len(maps) > 1:
        for index in maps[0]:
            if index >= 0:
                yield from _pieces(array[index], maps[1:])
            else:
                yield from _zeros(row_nbytes)
        return
    rows = max(1, PIECE_NBYTES // row_nbytes)
    for start in range(0, len(maps[0]), rows):
        yield _flat(_take(array, [maps[0][start : start + rows], *maps[1:]]))


def _zeros(nbytes: int) -> Iterator[Bytes]:
    for start in range(0, nbytes, PIECE_NBYTES):
        yield np.zeros(min(PIECE_NBYTES, nbytes - start), dtype=np.uint8)


def _take(array: Array, maps: Sequence[Indices]) -> Array:
    """`array` at the indices of each dimension, zeros where an index is -1; a view where every dimension is a run."""
    scattered = []
    for d, indices in enumerate(maps):
        runs = _runs(indices)
        if len(runs) == 1 and indices[0] >= 0:
            array = array[(slice(None),) * d + (slice(int(indices[0]), int(indices[0]) + len(indices)),)]
        else:
            scattered.append((d, indices, runs))
    for d, indices, runs in scattered:
        array = _gather(array, d, indices, runs)
    return array


def _runs(indices: Indices) -> Indices:
    """Where runs of consecutive indices, or of padding, begin: positions in `indices`, ascending."""
    steps = np.diff(indices)
    padding = indices[1:] < 0
    breaks = np.where(padding & (indices[:-1] < 0), False, steps != 1) | (padding != (indices[:-1] < 0))
    return np.concatenate([[0], np.flatnonzero(breaks) + 1])


def _gather(array: Array, d: int, indices: Indices, runs: Indices) -> Array:
    before: tuple[Any, ...] = (slice(None),) * d
    if len(runs) > _MOST_RUNS:
        taken = np.take(array, np.maximum(indices, 0), axis=d)
        taken[(*before, indices < 0)] = 0
        return taken
    found = np.empty((*array.shape[:d], len(indices), *array.shape[d + 1 :]), dtype=array.dtype)
    for start, stop in zip(runs, [*runs[1:], len(indices)], strict=True):
        first = indices[start]
        place = (*before, slice(start, stop))
        found[place] = 0 if first < 0 else array[(*before, slice(first, first + stop - start))]
    return found


def _flat(array: Array) -> Bytes:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


# -- elements below one byte -----------------------------------------------------------------------------------------


def _byte_map(shape: tuple[int, ...], maps: Sequence[Indices], per_byte: int) -> Indices | None:
    """The last dimension's map in bytes, if whole bytes stay together in it."""
    if not shape or shape[-1] % per_byte or len(maps[-1]) % per_byte:
        return None
    groups = maps[-1].reshape(-1, per_byte)
    first = groups[:, 0]
    together = groups == first[:, None] + np.arange(per_byte)
    if not np.all(np.where(first[:, None] < 0, groups < 0, together & (first[:, None] % per_byte == 0))):
        return None
    return np.asarray(first // per_byte, dtype=np.int64)  # -1 stays -1


def _unpacked(data: Bytes, bits: int, count: int) -> Bytes:
    """The codes of `count` elements, one byte for each; the first of a byte is in its lowest bits."""
    shifts = np.arange(8 // bits, dtype=np.uint8) * np.uint8(bits)
    codes = (data[:, None] >> shifts) & np.uint8(2**bits - 1)
    return codes.reshape(-1)[:count]


def _packed(codes: Bytes, bits: int) -> Bytes:
    """Codes of one byte each as ONNX packs them, the first in the lowest bits."""
    per_byte = 8 // bits
    padded = np.zeros(-(-len(codes) // per_byte) * per_byte, dtype=np.uint8)
    padded[: len(codes)] = codes
    shifts = np.arange(per_byte, dtype=np.uint8) * np.uint8(bits)
    return np.asarray(np.bitwise_or.reduce(padded.reshape(-1, per_byte) << shifts, axis=1), dtype=np.uint8)
