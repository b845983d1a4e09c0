"""Faults of what differs from rank to rank: masks, and places in tables."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from furiosa_llm.runtime.artifact.manifest import StoredTensor
from tests.support.builder.fault_subject import Subject, kind, lookups

# -- masks -----------------------------------------------------------------------------------------------------------


def masks(subject: Subject, *, scalar: bool) -> Iterator[tuple[int, StoredTensor]]:
    """Where(mask of ranks, x, 0): those that count once, or those that clear padding."""
    for i in subject.nodes("Where"):
        made = subject.made(subject.node(i).input[0])
        if made is not None and (made.local_shape == ()) is scalar:
            yield i, made


@kind("what counts once is not masked")
def _(subject: Subject) -> Iterator[Subject]:
    for i, _ in masks(subject, scalar=True):
        found = subject.copy()
        found.remove(i, found.node(i).input[1])
        yield found


@kind("a mask that lets all ranks through, or none")
def _(subject: Subject) -> Iterator[Subject]:
    for _, mask in masks(subject, scalar=True):
        for value in (True, False):
            found = subject.copy()
            found.set_shards(mask.name, [np.array(value)] * subject.mesh.size)
            yield found


@kind("a mask that lets one rank too many through")
def _(subject: Subject) -> Iterator[Subject]:
    for _, mask in masks(subject, scalar=True):
        shards = subject.shards(mask.name)
        shards[next(rank for rank, shard in enumerate(shards) if not shard)] = np.array(True)
        found = subject.copy()
        found.set_shards(mask.name, shards)
        yield found


@kind("a mask turned round")
def _(subject: Subject) -> Iterator[Subject]:
    for i, mask in masks(subject, scalar=True):
        if subject.mesh.parts(mask.shard_axes) > 2:  # of two ranks, either may count
            found = subject.copy()
            node = found.node(i)
            node.input[1], node.input[2] = node.input[2], node.input[1]
            yield found


@kind("a mask over fewer axes")
def _(subject: Subject) -> Iterator[Subject]:
    for _, mask in masks(subject, scalar=True):
        if len(mask.shard_axes) > 1:
            found = subject.copy()
            axis = mask.shard_axes[0]
            found.set_shards(
                mask.name, [np.array(subject.mesh.coordinates(rank)[axis] == 0) for rank in range(subject.mesh.size)]
            )
            yield found


@kind("padding that is not cleared")
def _(subject: Subject) -> Iterator[Subject]:
    for i, _ in masks(subject, scalar=False):
        found = subject.copy()
        found.remove(i, found.node(i).input[1])
        yield found


@kind("a mask of padding of another rank")
def _(subject: Subject) -> Iterator[Subject]:
    for _, mask in masks(subject, scalar=False):
        shards = subject.shards(mask.name)
        for changed in (shards[::-1], [np.ones_like(shard) for shard in shards]):
            if any(not np.array_equal(a, b) for a, b in zip(shards, changed, strict=True)):
                found = subject.copy()
                found.set_shards(mask.name, changed)
                yield found


# -- tables ----------------------------------------------------------------------------------------------------------


def offsets(subject: Subject) -> list[StoredTensor]:
    """Where each rank's part of a table begins."""
    read = {name for i in subject.nodes("Sub") for name in subject.node(i).input}
    return [made for name in sorted(read) if (made := subject.made(name)) is not None]


@kind("a table that begins one row off")
def _(subject: Subject) -> Iterator[Subject]:
    for offset in offsets(subject):
        shards = subject.shards(offset.name)
        for rank in range(subject.mesh.size):
            found = subject.copy()
            found.set_shards(offset.name, [s + (r == rank) for r, s in enumerate(shards)])
            yield found


@kind("a table that begins with the same row on all ranks")
def _(subject: Subject) -> Iterator[Subject]:
    for offset in offsets(subject):
        found = subject.copy()
        found.set_shards(offset.name, [np.zeros_like(s) for s in subject.shards(offset.name)])
        yield found


@kind("tables of two ranks exchanged")
def _(subject: Subject) -> Iterator[Subject]:
    for offset in offsets(subject):
        found = subject.copy()
        found.set_shards(offset.name, subject.shards(offset.name)[::-1])
        yield found


@kind("the offset into a table left out")
def _(subject: Subject) -> Iterator[Subject]:
    for i in subject.nodes("Sub"):
        if subject.made(subject.node(i).input[1]) is not None:
            found = subject.copy()
            found.remove(i, found.node(i).input[0])
            yield found


@kind("a bound of a table wrong")
def _(subject: Subject) -> Iterator[Subject]:
    ends = ("/is_below", "/is_above/not", "/is_behind_all/not")
    for i in (i for end in ends for i in lookups(subject, end)):
        bound = subject.inline(subject.node(i).input[1])
        assert bound is not None
        for change in (-1, 1):
            found = subject.copy()
            found.node(i).input[1] = found.constant(bound + np.array(change, dtype=bound.dtype))
            yield found


@kind("rows of other ranks not zeroed")
def _(subject: Subject) -> Iterator[Subject]:
    for i in lookups(subject, "/here"):
        found = subject.copy()
        found.remove(i, found.node(i).input[1])
        yield found


@kind("rows of other ranks kept, own ones zeroed")
def _(subject: Subject) -> Iterator[Subject]:
    for i in lookups(subject, "/here"):
        found = subject.copy()
        node = found.node(i)
        node.input[1], node.input[2] = node.input[2], node.input[1]
        yield found


@kind("negative positions not counted from the end")
def _(subject: Subject) -> Iterator[Subject]:
    for i in lookups(subject, "/row"):
        found = subject.copy()
        found.remove(i, found.node(i).input[2])
        yield found


@kind("positions out of the table not refused")
def _(subject: Subject) -> Iterator[Subject]:
    for i in lookups(subject, "/safe_row"):
        found = subject.copy()
        found.remove(i, found.node(i).input[2])
        yield found


@kind("a split table looked up at global positions")
def _(subject: Subject) -> Iterator[Subject]:
    for i in lookups(subject, "/rows"):
        row = next(r for r in lookups(subject, "/row"))
        found = subject.copy()
        found.node(i).input[1] = found.node(row).output[0]
        yield found


@kind("the part of another rank")
def _(subject: Subject) -> Iterator[Subject]:
    for i in subject.nodes("Gather"):
        made = subject.made(subject.node(i).input[1])
        if made is None:
            continue
        shards = subject.shards(made.name)
        for changed in (shards[::-1], [np.roll(s, 1) + 1 for s in shards], [shards[0]] * len(shards)):
            found = subject.copy()
            found.set_shards(made.name, changed)
            yield found
