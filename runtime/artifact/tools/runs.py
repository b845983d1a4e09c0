"""Layouts as runs of consecutive indices: which part of a shard is which part of the whole tensor, piece by piece.

`layout.index_map` says the same index by index. Runs are what is copied at once: a shard of a matrix that is split over
whole rows is one run, and one of packed query, key and value heads is three.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from furiosa_llm.runtime.artifact.layout import Cat, Dim, Leaf, Mesh, Prefix, axes_of, global_size, local_size

Runs = npt.NDArray[np.int64]
"""`[number of runs, 3]`: first local index, first global index, length; local indices ascend, padding is in none."""

Index = tuple[slice, ...] | tuple[npt.NDArray[np.int64], ...]

_MIN_RUN_NBYTES = 256
"""Where runs are shorter than this on average, numpy gathers them faster than a loop copies them."""


def runs_of(dim: Dim, mesh: Mesh, rank: int) -> Runs:
    """The runs that `rank` holds of a dimension, none of them empty and no two that are one."""
    if isinstance(dim, Leaf):
        count = local_size(dim, mesh)
        start = mesh.position(rank, dim.axes) * count
        return _runs([(0, start, min(count, dim.size - start))])
    if isinstance(dim, Prefix):
        if not axes_of(dim):
            return _runs([(0, 0, dim.size)])
        runs = runs_of(dim.part, mesh, rank)
        runs[:, 2] = np.minimum(runs[:, 2], dim.size - runs[:, 1])
        return runs[runs[:, 2] > 0]
    parts = [Extent(local_size(p, mesh), global_size(p), runs_of(p, mesh, rank)) for p in dim.parts]
    if isinstance(dim, Cat):
        return _concatenated(parts)
    return product_of(parts).runs


@dataclass(frozen=True, slots=True)
class Extent:
    """One dimension of a shard: `local` indices of it, `whole` of the tensor, and the `runs` that they share."""

    local: int
    whole: int
    runs: Runs

    @property
    def is_whole(self) -> bool:
        """Whether the shard has every index of the dimension, in order."""
        return self.local == self.whole == self.num_valid

    @property
    def num_valid(self) -> int:
        """How many local indices are not padding."""
        return int(self.runs[:, 2].sum())

    def scaled(self, factor: int) -> Extent:
        """The extent in units that are `factor` times as small."""
        return Extent(self.local * factor, self.whole * factor, self.runs * factor)

    def divided(self, divisor: int) -> Extent:
        """The extent in units that are `divisor` times as large, which all of its numbers are multiples of."""
        return Extent(self.local // divisor, self.whole // divisor, self.runs // divisor)

    @property
    def unit(self) -> int:
        """The largest number that divides all of its numbers, 0 if all of them are 0."""
        return math.gcd(self.local, self.whole, int(np.gcd.reduce(self.runs, axis=None, initial=0)))

    def clipped(self, start: int, stop: int) -> Extent:
        """The local indices [start, stop) only."""
        begin, end = np.maximum(self.runs[:, 0], start), np.minimum(self.runs[:, 0] + self.runs[:, 2], stop)
        runs = np.stack([begin - start, self.runs[:, 1] + begin - self.runs[:, 0], end - begin], axis=1)
        return Extent(stop - start, self.whole, runs[runs[:, 2] > 0])

    def index_map(self) -> npt.NDArray[np.int64]:
        """The global index of each local index, -1 where it is padding."""
        indices = np.full(self.local, -1, dtype=np.int64)
        local, whole = self.indices()
        indices[local] = whole
        return indices

    def indices(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The local indices that are not padding, and the global index of each."""
        length = self.runs[:, 2]
        within = np.arange(int(length.sum()), dtype=np.int64) - np.repeat(np.cumsum(length) - length, length)
        return np.repeat(self.runs[:, 0], length) + within, np.repeat(self.runs[:, 1], length) + within


def product_of(parts: Sequence[Extent]) -> Extent:
    """The row-major product of `parts`, the first the slowest, as one dimension."""
    product = Extent(1, 1, _runs([(0, 0, 1)]))
    for part in parts:
        if part.is_whole:
            product = product.scaled(part.whole)
            continue
        local, whole = product.indices()
        starts = np.stack([local * part.local, whole * part.whole], axis=1)
        runs = np.empty((len(starts), len(part.runs), 3), dtype=np.int64)
        runs[:, :, :2] = starts[:, None, :] + part.runs[None, :, :2]
        runs[:, :, 2] = part.runs[None, :, 2]
        product = Extent(product.local * part.local, product.whole * part.whole, _joined(runs.reshape(-1, 3)))
    return product


def joined_extents(extents: Sequence[Extent]) -> tuple[Extent, ...]:
    """The same shard with the fewest dimensions: at least one, and none but the first whole."""
    joined = [Extent(1, 1, _runs([(0, 0, 1)]))]
    for extent in extents:
        if extent.is_whole or joined[-1].local == joined[-1].whole == 1:
            joined[-1] = product_of([joined[-1], extent])
        else:
            joined.append(extent)
    return tuple(joined)


def pieces(extents: Sequence[Extent], limit: int) -> Iterator[tuple[int, tuple[Extent, ...]]]:
    """A shard in contiguous pieces of at most `limit` units: where each starts, and its extents."""
    first, rest = extents[0], tuple(extents[1:])
    row = math.prod(extent.local for extent in rest)
    if first.local * row <= limit:
        yield 0, tuple(extents)
    elif row <= limit:
        step = limit // row
        for start in range(0, first.local, step):
            yield start * row, (first.clipped(start, min(start + step, first.local)), *rest)
    else:
        for index in range(first.local):
            for start, piece in pieces(rest, limit):
                yield index * row + start, (first.clipped(index, index + 1), *piece)


def places(extents: Sequence[Extent], unit_nbytes: int) -> Iterator[tuple[Index, Index]]:
    """Where a piece has what is not padding, and where the whole tensor has it: pairs of indices of either."""
    num_valid = math.prod(extent.num_valid for extent in extents)
    num_runs = math.prod(len(extent.runs) for extent in extents)
    if num_runs > 1 and num_valid * unit_nbytes < _MIN_RUN_NBYTES * num_runs:
        both = [extent.indices() for extent in extents]
        yield np.ix_(*(local for local, _ in both)), np.ix_(*(whole for _, whole in both))
        return
    for chosen in itertools.product(*(extent.runs.tolist() for extent in extents)):
        yield (
            tuple(slice(local, local + length) for local, _, length in chosen),
            tuple(slice(whole, whole + length) for _, whole, length in chosen),
        )


def shifted(extent: Extent, start: int, whole: int) -> Extent:
    """The extent of a part that begins at index `start` of a longer dimension of `whole` indices."""
    return replace(extent, whole=whole, runs=extent.runs + np.array([0, start, 0]))


def extent_of(dim: Dim, mesh: Mesh, rank: int) -> Extent:
    """What `rank` holds of a dimension."""
    return Extent(local_size(dim, mesh), global_size(dim), runs_of(dim, mesh, rank))


def _runs(rows: Sequence[tuple[int, int, int]]) -> Runs:
    return np.array([row for row in rows if row[2] > 0], dtype=np.int64).reshape(-1, 3)


def _concatenated(parts: Sequence[Extent]) -> Runs:
    runs, local, whole = [], 0, 0
    for part in parts:
        runs.append(part.runs + np.array([local, whole, 0]))
        local, whole = local + part.local, whole + part.whole
    return _joined(np.concatenate(runs))


def _joined(runs: Runs) -> Runs:
    """The same runs with those joined that follow each other on both sides."""
    if not len(runs):
        return runs
    follows = ((runs[:-1, :2] + runs[:-1, 2:]) == runs[1:, :2]).all(axis=1)
    first = np.flatnonzero(np.concatenate([[True], ~follows]))
    joined = runs[first]
    joined[:, 2] = np.add.reduceat(runs[:, 2], first)
    return joined
