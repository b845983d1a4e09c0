"""Put original tensors together again from the shards that an artifact stores.

What is read at a time is a piece of a shard, so that it takes the memory of the original and some tens of megabytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from furiosa_llm.runtime.artifact.dtypes import DTYPES, DType
from furiosa_llm.runtime.artifact.errors import ArtifactError
from furiosa_llm.runtime.artifact.json_reader import REBUILD
from furiosa_llm.runtime.artifact.layout import Mesh, global_size
from furiosa_llm.runtime.artifact.manifest import OriginalInitializer, StoredTensor
from furiosa_llm.runtime.artifact.reader import Artifact, Window
from furiosa_llm.runtime.artifact.source import read_source
from furiosa_llm.runtime.artifact.tools.runs import Extent, extent_of, joined_extents, pieces, places, shifted

Bytes = npt.NDArray[np.uint8]

_PIECE_NBYTES = 8 * 2**20
_PIECE_ELEMENTS = 2**20
"""Of elements below a byte whose runs do not begin and end with bytes; a multiple of 8. Each takes some 40 bytes."""


def read_original(artifact: Artifact, name: str) -> Bytes:
    """The bytes of the original initializer `name`, packed as ONNX packs them: uint8 `[nbytes]`.

    They are not compared with the manifest's digest (`unbuild` does). Raises ArtifactError if the manifest has no such
    initializer, stores nothing of it, or stores what does not make it up.
    """
    entry = next((entry for entry in artifact.manifest.initializers if entry.name == name), None)
    if entry is None or not entry.stored:
        known = "whose data is in source.onnx" if entry is not None else "unknown to manifest.json"
        raise ArtifactError(
            f"found the initializer {name!r:.80}, {known}; expected one that manifest.json stores, "
            "see its `initializers`"
        )
    _check_entry(artifact, entry)
    return read_whole(artifact, entry.stored)


def default_inputs(artifact: Artifact) -> dict[str, npt.NDArray[Any]]:
    """What inputs are that a caller leaves out: those that the model has initializers for, in the model's own types."""
    entries = {entry.name: entry for entry in artifact.manifest.initializers}
    wanted = [info.name for info in artifact.manifest.inputs if info.name in entries]
    if not wanted:
        return {}
    kept = {tensor.name: tensor for tensor in read_source(artifact).graph.initializer}
    found: dict[str, npt.NDArray[Any]] = {}
    for name in wanted:
        if entries[name].stored:
            data = read_original(artifact, name).view(DTYPES[entries[name].dtype].numpy)
            found[name] = data.reshape(entries[name].shape)
        else:
            found[name] = onnx.numpy_helper.to_array(kept[name])
    return found


def read_whole(artifact: Artifact, stored: Sequence[str]) -> Bytes:
    """The bytes of the tensor that the tensors `stored` make up, packed as ONNX packs them: uint8 `[nbytes]`.

    `stored` is one tensor, or the parts of one in order. Elements below a byte fill bytes from the lowest bits on.
    Raises ArtifactError if they do not make up one tensor.
    """
    tensors = [artifact.tensors[name] for name in stored]
    shape = _whole_shape(tensors)
    dtype = DTYPES[tensors[0].dtype]
    whole = np.zeros(dtype.nbytes(shape), dtype=np.uint8)
    for tensor in tensors:
        for rank in _ranks(tensor, artifact.manifest.mesh):
            extents = _extents(tensor, artifact.manifest.mesh, rank, shape)
            in_bytes = _in_bytes(extents, dtype)
            if in_bytes is None:
                for codes, indices, _ in _element_pieces(artifact, tensor, rank, extents, dtype):
                    _pack_into(whole, codes, indices, dtype.bits)
            else:
                _copy_into(whole, artifact, artifact.window(tensor.name, rank), in_bytes)
    return whole


def padding_is_zero(artifact: Artifact, name: str) -> bool:
    """Whether the padding in all shards of the stored tensor `name` is zeros, unused bits of a last byte included.

    A tensor of the builder's own (without a layout) has no padding. Nothing is read of a tensor that has none.
    """
    tensor = artifact.tensors[name]
    if tensor.layout is None:
        return True
    dtype, mesh = DTYPES[tensor.dtype], artifact.manifest.mesh
    return all(
        _shard_padding_is_zero(artifact, tensor, rank, _extents(tensor, mesh, rank, None), dtype)
        for rank in _ranks(tensor, mesh)
    )


def _shard_padding_is_zero(
    artifact: Artifact, tensor: StoredTensor, rank: int, extents: tuple[Extent, ...], dtype: DType
) -> bool:
    in_bytes = _in_bytes(extents, dtype)
    if in_bytes is None:
        found = _element_pieces(artifact, tensor, rank, extents, dtype)
        return not any(codes[indices < 0].any() or unused for codes, indices, unused in found)
    if all(extent.num_valid == extent.local for extent in in_bytes):
        return True
    unit, units = _in_units(in_bytes)
    for data, piece in _pieces(artifact, artifact.window(tensor.name, rank), unit, units):
        for local, _ in places(piece, unit):
            data[local] = 0
        if data.any():
            return False
    return True


def _check_entry(artifact: Artifact, entry: OriginalInitializer) -> None:
    tensors = [artifact.tensors[name] for name in entry.stored]
    found, dtype = _whole_shape(tensors), tensors[0].dtype
    if (found, dtype) != (entry.shape, entry.dtype):
        raise ArtifactError(
            f"initializer {entry.name!r:.80} is stored as {dtype} {list(found)}, expected {entry.dtype} "
            f"{list(entry.shape)}; {REBUILD}"
        )


def _whole_shape(tensors: Sequence[StoredTensor]) -> tuple[int, ...]:
    """The shape of the tensor that `tensors` make up."""
    first = tensors[0]
    if first.layout is None:
        raise ArtifactError(
            f"stored tensor {first.name!r:.80} has no layout, expected one that was cut from a tensor of the source"
        )
    shape = [global_size(dim) for dim in first.layout]
    if len(tensors) == 1 and first.part is None:
        return tuple(shape)
    end, dim = 0, None if first.part is None else first.part.dim
    for tensor in tensors:
        part, layout = tensor.part, tensor.layout
        if part is None or layout is None or dim is None or (part.dim, part.start) != (dim, end):
            found = (
                "a whole tensor" if part is None else f"the part of dimension {part.dim} that starts at {part.start}"
            )
            raise ArtifactError(
                f"stored tensor {tensor.name!r:.80} is {found}, expected the part of dimension {dim} that starts at "
                f"{end}; {REBUILD}"
            )
        end = shape[dim] = part.stop
        expected = [*shape[:dim], part.stop - part.start, *shape[dim + 1 :]]
        if (tensor.dtype, [global_size(size) for size in layout]) != (first.dtype, expected):
            raise ArtifactError(
                f"stored tensor {tensor.name!r:.80} is {tensor.dtype} {[global_size(size) for size in layout]}, "
                f"expected {first.dtype} {expected} like {first.name!r:.80}; {REBUILD}"
            )
    return tuple(shape)


def _ranks(tensor: StoredTensor, mesh: Mesh) -> list[int]:
    """One rank for each shard."""
    by_shard: dict[int, int] = {}
    for rank in range(mesh.size):
        by_shard.setdefault(mesh.position(rank, tensor.shard_axes), rank)
    return [by_shard[shard] for shard in sorted(by_shard)]


def _extents(tensor: StoredTensor, mesh: Mesh, rank: int, shape: tuple[int, ...] | None) -> tuple[Extent, ...]:
    """What `rank` has of the tensor, placed in the whole one of `shape` (None: in its own part)."""
    assert tensor.layout is not None
    extents = [extent_of(dim, mesh, rank) for dim in tensor.layout]
    if tensor.part is not None and shape is not None:
        dim = tensor.part.dim
        extents[dim] = shifted(extents[dim], tensor.part.start, shape[dim])
    return joined_extents(extents)


def _in_bytes(extents: tuple[Extent, ...], dtype: DType) -> tuple[Extent, ...] | None:
    """The extents with the last in bytes, None if its runs begin or end within a byte."""
    last = extents[-1].scaled(dtype.bits)
    return None if last.unit % 8 else (*extents[:-1], last.divided(8))


def _in_units(in_bytes: tuple[Extent, ...]) -> tuple[int, tuple[Extent, ...]]:
    """The widest integers that nothing cuts through, in bytes, and the extents with the last in those."""
    unit = math.gcd(in_bytes[-1].unit, 8)
    return unit, (*in_bytes[:-1], in_bytes[-1].divided(unit))


def _copy_into(whole: Bytes, artifact: Artifact, window: Window, in_bytes: tuple[Extent, ...]) -> None:
    unit, units = _in_units(in_bytes)
    target = whole.view(f"u{unit}").reshape([extent.whole for extent in units])
    for data, piece in _pieces(artifact, window, unit, units):
        for local, place in places(piece, unit):
            target[place] = data[local]


def _pieces(
    artifact: Artifact, window: Window, unit: int, units: tuple[Extent, ...]
) -> Iterator[tuple[npt.NDArray[np.unsignedinteger], tuple[Extent, ...]]]:
    """The shard at `window` piece by piece: an array of unsigned integers, and its extents."""
    for start, piece in pieces(units, _PIECE_NBYTES // unit):
        shape = [extent.local for extent in piece]
        nbytes = math.prod(shape) * unit
        data = artifact.read_window(Window(file=window.file, offset=window.offset + start * unit, nbytes=nbytes))
        yield data.view(f"u{unit}").reshape(shape), piece


def _element_pieces(
    artifact: Artifact, tensor: StoredTensor, rank: int, extents: tuple[Extent, ...], dtype: DType
) -> Iterator[tuple[Bytes, npt.NDArray[np.int64], bool]]:
    """A shard of elements below a byte, piece by piece.

    Gives the elements' bits, each in a byte of its own; the index of each in the whole tensor, -1 for padding; and
    whether bits after the last element are set.
    """
    window = artifact.window(tensor.name, rank)
    shape = [extent.local for extent in extents]
    maps = [extent.index_map() for extent in extents]
    total, per_byte = math.prod(shape), 8 // dtype.bits
    for start in range(0, total, _PIECE_ELEMENTS):
        count = min(_PIECE_ELEMENTS, total - start)
        offset, nbytes = window.offset + start // per_byte, -(-count // per_byte)
        data = artifact.read_window(Window(file=window.file, offset=offset, nbytes=nbytes))
        codes = _unpacked(data, dtype.bits)
        yield codes[:count], _flat_indices(maps, extents, shape, start, count), bool(codes[count:].any())


def _flat_indices(
    maps: Sequence[npt.NDArray[np.int64]], extents: Sequence[Extent], shape: Sequence[int], start: int, count: int
) -> npt.NDArray[np.int64]:
    """The index in the whole tensor of each of `count` elements of a shard from `start` on, -1 for padding."""
    indices = np.zeros(count, dtype=np.int64)
    padding = np.zeros(count, dtype=np.bool_)
    coordinates = np.unravel_index(np.arange(start, start + count), shape)
    for coordinate, index_map, extent in zip(coordinates, maps, extents, strict=True):
        found = index_map[coordinate]
        padding |= found < 0
        indices = indices * extent.whole + found
    indices[padding] = -1
    return indices


def _unpacked(data: Bytes, bits: int) -> Bytes:
    """The elements in packed bytes, the first in the lowest bits, each in a byte of its own."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return ((data[:, None] >> shifts) & np.uint8(2**bits - 1)).reshape(-1)


def _pack_into(whole: Bytes, codes: Bytes, indices: npt.NDArray[np.int64], bits: int) -> None:
    """Set the elements at `indices` of packed bytes that are zero there; no element comes twice."""
    per_byte = 8 // bits
    for position in range(per_byte):
        chosen = np.flatnonzero((indices >= 0) & (indices % per_byte == position))
        whole[indices[chosen] // per_byte] |= codes[chosen] << np.uint8(position * bits)
