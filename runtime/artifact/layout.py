"""How one dimension of a global tensor is laid out over the ranks of a mesh.

A dimension is a tree. A `Leaf` is a run of indices that may be split over mesh axes; a `Prod` is an outer product of
dimensions (row-major: the first part is the slowest); a `Cat` is a concatenation. Query heads packed with keys and
values, for instance, are `Cat((Prod((kv, g, d)), Prod((kv, d)), Prod((kv, d))))`. A `Prefix` is the first indices of a
longer dimension: 176 columns in blocks of 32, of which the sixth is half full, are `Prefix(176, Prod((6, 32)))`.

All ranks have equal local sizes. A leaf of `size` n split in `parts` pieces has ceil(n / parts) local indices on every
rank, and the indices beyond n are padding: they appear as -1 in an index map, and hold zeros in a stored weight. So are
the indices beyond a prefix, where it is split; where it is whole, nothing is beyond.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from furiosa_llm.runtime.artifact.errors import LayoutError

IndexMap = npt.NDArray[np.int64]

_MAX_DEPTH = 64
_MAX_PARTS = 1024
MAX_SIZE = 2**48
"""A dimension has fewer indices; the largest tables have some 2**32."""


@dataclass(frozen=True, slots=True)
class Mesh:
    """The ranks of one tensor parallelism group as a grid; `shape` (2, 2, 2) has 8 ranks, the last axis fastest."""

    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many ranks the mesh has."""
        return math.prod(self.shape)

    def coordinates(self, rank: int) -> tuple[int, ...]:
        """The position of `rank` on every mesh axis."""
        if not 0 <= rank < self.size:
            raise LayoutError(f"rank {rank} is not on a mesh of {self.size} ranks")
        coordinates: list[int] = []
        for length in reversed(self.shape):
            rank, position = divmod(rank, length)
            coordinates.append(position)
        return tuple(reversed(coordinates))

    def parts(self, axes: Sequence[int]) -> int:
        """The number of pieces that a split over `axes` makes."""
        return math.prod(self.shape[axis] for axis in axes)

    def position(self, rank: int, axes: Sequence[int]) -> int:
        """The mixed-radix position of `rank` on `axes`, the first axis most significant."""
        coordinates = self.coordinates(rank)
        position = 0
        for axis in axes:
            position = position * self.shape[axis] + coordinates[axis]
        return position

    def groups(self, axes: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """The groups of ranks that differ on `axes` only, each in the order of `position`."""
        others = [axis for axis in range(len(self.shape)) if axis not in axes]
        members: dict[int, list[int]] = {}
        for rank in range(self.size):
            members.setdefault(self.position(rank, others), []).append(rank)
        return tuple(tuple(sorted(g, key=lambda r: self.position(r, axes))) for g in members.values())


@dataclass(frozen=True, slots=True)
class Leaf:
    """`size` consecutive indices, split over mesh `axes` (none: replicated), the first axis most significant."""

    size: int
    axes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Prod:
    """The row-major product of `parts`, the first the slowest."""

    parts: tuple[Dim, ...]


@dataclass(frozen=True, slots=True)
class Cat:
    """The concatenation of `parts`."""

    parts: tuple[Dim, ...]


@dataclass(frozen=True, slots=True)
class Prefix:
    """The first `size` indices of `part`, which is longer: what whole blocks have beyond is padding."""

    size: int
    part: Dim


Dim = Leaf | Prod | Cat | Prefix


def parts_of(dim: Dim) -> tuple[Dim, ...]:
    """What `dim` is made of; a leaf of nothing."""
    match dim:
        case Leaf():
            return ()
        case Prefix():
            return (dim.part,)
        case _:
            return dim.parts


def leaves(dim: Dim) -> Iterator[Leaf]:
    """Every leaf below `dim`, in order."""
    if isinstance(dim, Leaf):
        yield dim
    else:
        for part in parts_of(dim):
            yield from leaves(part)


def axes_of(dim: Dim) -> tuple[int, ...]:
    """The mesh axes that `dim` is split over, each once, in order of first appearance."""
    return tuple(dict.fromkeys(axis for leaf in leaves(dim) for axis in leaf.axes))


def global_size(dim: Dim) -> int:
    """The number of indices of the whole dimension, padding left out."""
    if isinstance(dim, Leaf | Prefix):
        return dim.size
    sizes = [global_size(part) for part in dim.parts]
    return math.prod(sizes) if isinstance(dim, Prod) else sum(sizes)


def local_size(dim: Dim, mesh: Mesh) -> int:
    """The number of indices that each rank holds, padding included."""
    if isinstance(dim, Leaf):
        return -(-dim.size // mesh.parts(dim.axes))
    if isinstance(dim, Prefix):
        return local_size(dim.part, mesh) if axes_of(dim) else dim.size
    sizes = [local_size(part, mesh) for part in dim.parts]
    return math.prod(sizes) if isinstance(dim, Prod) else sum(sizes)


def index_map(dim: Dim, mesh: Mesh, rank: int) -> IndexMap:
    """The global index of each local index of `rank`: int64 `[local_size]`, -1 where it is padding."""
    if isinstance(dim, Leaf):
        count = local_size(dim, mesh)
        indices = np.arange(count, dtype=np.int64) + mesh.position(rank, dim.axes) * count
        return np.where(indices < dim.size, indices, -1)
    if isinstance(dim, Prefix):
        indices = index_map(dim.part, mesh, rank) if axes_of(dim) else np.arange(dim.size, dtype=np.int64)
        return np.where(indices < dim.size, indices, -1)
    maps = [index_map(part, mesh, rank) for part in dim.parts]
    sizes = [global_size(part) for part in dim.parts]
    if isinstance(dim, Cat):
        offsets = np.cumsum([0, *sizes[:-1]])
        return np.concatenate([np.where(m < 0, -1, m + o) for m, o in zip(maps, offsets, strict=True)])
    combined = np.zeros(1, dtype=np.int64)
    for part, size in zip(maps, sizes, strict=True):
        outer, inner = combined[:, None], part[None, :]
        combined = np.where((outer < 0) | (inner < 0), -1, outer * size + inner).reshape(-1)
    return combined


def simplify(dim: Dim) -> Dim:
    """The same layout with the fewest nodes: a tree without split leaves is one leaf."""
    if not axes_of(dim):
        return Leaf(global_size(dim))
    if isinstance(dim, Leaf):
        return dim
    if isinstance(dim, Prefix):
        return Prefix(dim.size, simplify(dim.part))
    parts: list[Dim] = []
    for part in map(simplify, dim.parts):
        previous = parts[-1] if parts else None
        if isinstance(part, Prod | Cat) and type(part) is type(dim):
            parts.extend(part.parts)
        elif isinstance(dim, Prod) and part == Leaf(1):
            continue
        elif isinstance(part, Leaf) and isinstance(previous, Leaf) and not part.axes and not previous.axes:
            joined = previous.size * part.size if isinstance(dim, Prod) else previous.size + part.size
            parts[-1] = Leaf(joined)
        else:
            parts.append(part)
    return parts[0] if len(parts) == 1 else type(dim)(tuple(parts))


def to_json(dim: Dim) -> Any:
    """`dim` as the manifest writes it: an int, `{"size", "axes"}`, `{"prod"}`, `{"cat"}` or `{"prefix", "of"}`."""
    if isinstance(dim, Leaf):
        return {"size": dim.size, "axes": list(dim.axes)} if dim.axes else dim.size
    if isinstance(dim, Prefix):
        return {"prefix": dim.size, "of": to_json(dim.part)}
    return {"prod" if isinstance(dim, Prod) else "cat": [to_json(part) for part in dim.parts]}


def from_json(value: Any, mesh: Mesh) -> Dim:
    """The layout that `to_json` wrote; raises LayoutError for anything else or for axes that `mesh` has not."""
    return _FromJson(mesh).read(value, 0)[0]


_Read = tuple[Dim, int, bool]


class _FromJson:
    """Reads one layout, whatever it is made of, looking at each part once and letting no size grow beyond MAX_SIZE."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._parts = 0

    def read(self, value: Any, depth: int) -> _Read:
        """The layout, how many indices it has, and whether it is split."""
        self._parts += 1
        if depth > _MAX_DEPTH:
            raise LayoutError(f"a layout is nested deeper than {_MAX_DEPTH} levels")
        if self._parts > _MAX_PARTS:
            raise LayoutError(f"a layout has at most {_MAX_PARTS} parts; found one with more")
        if isinstance(value, int) and not isinstance(value, bool):
            return Leaf(_checked_size(value)), value, False
        if isinstance(value, Mapping) and value.keys() == {"size", "axes"}:
            size = _checked_size(value["size"])
            return Leaf(size, _checked_axes(value["axes"], self._mesh)), size, True
        if isinstance(value, Mapping) and value.keys() == {"prefix", "of"}:
            size = _checked_size(value["prefix"])
            return _checked_prefix(size, *self.read(value["of"], depth + 1)), size, True
        if isinstance(value, Mapping) and len(value) == 1:
            kind, parts = next(iter(value.items()))
            if kind in ("prod", "cat") and isinstance(parts, list) and parts:
                return self._of_parts(kind, [self.read(part, depth + 1) for part in parts[: _MAX_PARTS + 1]])
        expected = "an integer, {size, axes}, {prod: [...]}, {cat: [...]} or {prefix, of}"
        raise LayoutError(f"a layout is {expected}; found {reprlib.repr(value)}")

    def _of_parts(self, kind: str, parts: list[_Read]) -> _Read:
        dims, sizes = tuple(part[0] for part in parts), [part[1] for part in parts]
        size = math.prod(sizes) if kind == "prod" else sum(sizes)
        if size >= MAX_SIZE:
            raise LayoutError(f"a layout has fewer than 2**48 indices; found one of {size}")
        return Prod(dims) if kind == "prod" else Cat(dims), size, any(part[2] for part in parts)


def _checked_size(size: Any) -> int:
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < MAX_SIZE:
        raise LayoutError(f"a layout's size is an integer from 0 to 2**48; found {reprlib.repr(size)}")
    return size


def _checked_axes(axes: Any, mesh: Mesh) -> tuple[int, ...]:
    known = range(len(mesh.shape))
    valid = isinstance(axes, list) and all(isinstance(a, int) and not isinstance(a, bool) and a in known for a in axes)
    if not valid or len(set(axes)) != len(axes) or not axes:
        raise LayoutError(f"a layout's axes are distinct mesh axes below {len(mesh.shape)}; found {reprlib.repr(axes)}")
    return tuple(axes)


def _checked_prefix(size: int, part: Dim, whole: int, is_split: bool) -> Prefix:
    if not is_split:
        raise LayoutError(
            f"a layout's prefix is of a dimension that is split; found one of {reprlib.repr(to_json(part))}"
        )
    if not size < whole < 2 * size:
        raise LayoutError(f"a layout's prefix is more than half of its dimension, but not all; found {size} of {whole}")
    return Prefix(size, part)
