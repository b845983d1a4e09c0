"""Weights cut into shards: every piece against a plain reading of the index maps, packed types too."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from furiosa_llm.builder.lower.program_builder import ShardedTensor
from furiosa_llm.builder.write import shards as weights
from furiosa_llm.builder.write.shards import cut_shard, is_in_order, num_shards
from furiosa_llm.runtime.artifact.layout import Cat, Dim, Leaf, Mesh, Prefix, Prod, axes_of, index_map, local_size
from furiosa_llm.runtime.artifact.manifest import Part

MESH = Mesh((2, 2, 2))
LAYOUTS: dict[str, tuple[Dim, ...]] = {
    "whole": (Leaf(6), Leaf(10)),
    "rows": (Leaf(16, (0, 1, 2)), Leaf(10)),
    "rows, padded": (Leaf(9, (0, 1)), Leaf(10)),
    "columns": (Leaf(6), Leaf(16, (0, 1, 2))),
    "columns, padded": (Leaf(6), Prod((Leaf(3, (0, 1)), Leaf(4)))),
    "columns by the inner factor": (Leaf(5), Prod((Leaf(4), Leaf(6, (2,))))),
    "packed": (Leaf(3), Cat((Prod((Leaf(4, (0, 1)), Leaf(2))), Prod((Leaf(4, (0, 1)), Leaf(4)))))),
    "both": (Leaf(6, (0,)), Leaf(12, (1, 2))),
    "blocks, the last one short": (Leaf(4), Prefix(44, Prod((Leaf(6, (0, 1)), Leaf(8))))),
    "one dimension": (Leaf(24, (0, 1)),),
    "three dimensions": (Leaf(3), Leaf(8, (0, 1)), Leaf(4)),
    "nothing": (Leaf(0), Leaf(4)),
    "scalar": (),
}
DTYPES = {
    "FLOAT": np.float32,
    "FLOAT16": np.float16,
    "BFLOAT16": ml_dtypes.bfloat16,
    "INT64": np.int64,
    "BOOL": np.bool_,
    "UINT8": np.uint8,
    "INT4": ml_dtypes.int4,
    "UINT4": ml_dtypes.uint4,
    "UINT2": ml_dtypes.uint2,
}


def tensor_of(
    layout: tuple[Dim, ...], dtype: str, part: Part | None = None
) -> tuple[ShardedTensor, npt.NDArray[np.uint8]]:
    """A stored tensor with random elements, and its source's packed bytes."""
    sizes = [(dim.size if isinstance(dim, Leaf | Prefix) else len(whole_map(dim))) for dim in layout]
    if part is not None:
        sizes[part.dim] = part.stop + 3
    random = np.random.default_rng(0)
    elements = random.integers(0, 4 if dtype == "UINT2" else 2 if dtype == "BOOL" else 8, sizes)
    source = ir.Tensor(elements.astype(DTYPES[dtype]), name="w")
    axes = tuple(dict.fromkeys(axis for dim in layout for axis in axes_of(dim)))
    tensor = ShardedTensor(
        name="w",
        dtype=ir.DataType[dtype],
        local_shape=tuple(local_size(dim, MESH) for dim in layout),
        shard_axes=axes,
        layout=layout,
        source=source,
        part=part,
    )
    return tensor, np.frombuffer(source.tobytes(), dtype=np.uint8)


def whole_map(dim: Dim) -> list[int]:
    """Every global index of a dimension."""
    return sorted({int(i) for rank in range(MESH.size) for i in index_map(dim, MESH, rank)} - {-1})


def expected(tensor: ShardedTensor, position: int) -> bytes:
    """The shard, element by element."""
    assert tensor.source is not None
    assert tensor.layout is not None
    array = tensor.source.numpy()
    rank = next(r for r in range(MESH.size) if MESH.position(r, tensor.shard_axes) == position)
    maps = [index_map(dim, MESH, rank) for dim in tensor.layout]
    offset = [0] * len(maps)
    if tensor.part is not None:
        offset[tensor.part.dim] = tensor.part.start
    found = np.zeros(tensor.local_shape, dtype=array.dtype)
    for place in itertools.product(*[range(len(m)) for m in maps]):
        indices = [int(m[i]) for m, i in zip(maps, place, strict=True)]
        if min(indices, default=0) >= 0:
            found[place] = array[tuple(i + o for i, o in zip(indices, offset, strict=True))]
    return ir.Tensor(found, dtype=tensor.dtype).tobytes()


@pytest.mark.parametrize("piece_nbytes", [1, 7, 64, 2**20])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_shards(name: str, dtype: str, piece_nbytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "PIECE_NBYTES", piece_nbytes)
    tensor, data = tensor_of(LAYOUTS[name], dtype)
    for position in range(num_shards(tensor, MESH)):
        found = b"".join(piece.tobytes() for piece in cut_shard(tensor, data, MESH, position))
        assert found == expected(tensor, position)
        assert len(found) == tensor.local_nbytes


@pytest.mark.parametrize("dtype", ["FLOAT", "INT4"])
@pytest.mark.parametrize("start", [0, 3, 4])
def test_shards_of_a_part(dtype: str, start: int) -> None:
    layout = (Leaf(5), Prod((Leaf(3, (0, 1)), Leaf(4))))
    tensor, data = tensor_of(layout, dtype, Part(dim=1, start=start, stop=start + 12))
    for position in range(4):
        found = b"".join(piece.tobytes() for piece in cut_shard(tensor, data, MESH, position))
        assert found == expected(tensor, position)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_digest_is_shared_only_where_the_bytes_are_the_same(name: str) -> None:
    """If shards are said to be in order, they are the source's bytes; rows, whole ones and scalars are."""
    tensor, data = tensor_of(LAYOUTS[name], "FLOAT")
    stored = b"".join(
        piece.tobytes() for k in range(num_shards(tensor, MESH)) for piece in cut_shard(tensor, data, MESH, k)
    )
    assert not is_in_order(tensor, MESH) or stored == data.tobytes()
    if name in ("whole", "rows", "one dimension", "scalar"):
        assert is_in_order(tensor, MESH)


def test_a_run_of_the_source_is_not_copied() -> None:
    tensor, data = tensor_of((Leaf(16, (0, 1, 2)), Leaf(10)), "FLOAT")
    (piece,) = cut_shard(tensor, data, MESH, 3)
    assert np.shares_memory(piece, data)


def test_pieces_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is put together at once is bounded, whatever the shape: one row may be larger than a piece."""
    monkeypatch.setattr(weights, "PIECE_NBYTES", 64)
    for layout in ((Leaf(2), Leaf(400, (0,))), (Leaf(400, (0,)), Leaf(2)), (Leaf(1), Leaf(400)), (Leaf(999, (0,)),)):
        tensor, data = tensor_of(layout, "FLOAT")
        assert max(len(piece) for piece in cut_shard(tensor, data, MESH, 0)) <= 64
