"""Cut weights into the shards that the artifact stores."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from furiosa_llm.builder.program import ShardedTensor
from furiosa_llm.runtime.artifact.layout import Mesh, axes_of, index_map


def num_shards(tensor: ShardedTensor, mesh: Mesh) -> int:
    """How many distinct shards a tensor has."""
    return mesh.parts(tensor.shard_axes)


def shard(tensor: ShardedTensor, mesh: Mesh, position: int) -> npt.NDArray[Any]:
    """Shard `position` along the tensor's `shard_axes`: an array of its local shape, zeros where it is padding."""
    if tensor.source is None:
        assert tensor.made is not None
        return np.asarray(tensor.made()[position])
    array = tensor.source.numpy()
    assert tensor.layout is not None
    if tensor.part is not None:
        array = array[(slice(None),) * tensor.part.dim + (slice(tensor.part.start, tensor.part.stop),)]
    rank = next(r for r in range(mesh.size) if mesh.position(r, tensor.shard_axes) == position)
    for d, dim in enumerate(tensor.layout):
        if axes_of(dim):
            array = _select(array, d, index_map(dim, mesh, rank))
    return np.ascontiguousarray(array).reshape(tensor.local_shape)


def _select(array: npt.NDArray[Any], d: int, indices: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    """`array` at `indices` of dimension d, zeros where an index is -1; a view where the indices are a run."""
    if len(indices) and indices[0] >= 0 and np.array_equal(indices, np.arange(indices[0], indices[0] + len(indices))):
        return array[(slice(None),) * d + (slice(int(indices[0]), int(indices[0]) + len(indices)),)]
    padding = indices < 0
    if not padding.any():
        return np.take(array, indices, axis=d)
    if padding.all():
        return np.zeros((*array.shape[:d], len(indices), *array.shape[d + 1 :]), dtype=array.dtype)
    taken = np.take(array, np.maximum(indices, 0), axis=d)
    taken[(slice(None),) * d + (padding,)] = np.zeros((), dtype=array.dtype)
    return taken
