"""Counters of what runs: each stage's runs, busy time and transfers, and each replica's tokens.

A runner has rows of counters, each written by one thread alone and read by anybody: no lock, and each counter only
grows. Times are kept in nanoseconds, so that every counter is a whole number.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from furiosa_llm.runtime.artifact.manifest import CollectiveKind

TransferKind = Literal["AllReduce", "AllGather", "Send"]
"""Send is the transfer of what crosses into a stage from earlier ones."""

TRANSFERS: tuple[TransferKind, ...] = ("AllReduce", "AllGather", "Send")
WIDTH = 2 + 3 * len(TRANSFERS)
"""Counters of a row: runs, busy time, then calls, bytes and time of each kind of transfer."""

Counters: TypeAlias = npt.NDArray[np.int64]
"""Counters; the last dimension has `WIDTH` of them."""

Row: TypeAlias = "memoryview[int]"
"""One row of counters, to be written."""

_COLLECTIVES: tuple[CollectiveKind, ...] = ("AllReduce", "AllGather")
_AT = [2 + 3 * index for index in range(len(TRANSFERS))]
"""Where the counters of each kind of transfer begin."""
_TIMES = [1, *(at + 2 for at in _AT)]


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferCounts:
    """What one kind of transfer did in a stage."""

    kind: TransferKind
    """A collective, or what the stage gets of earlier ones."""
    calls: int
    """How often it happened: for each collective of the program, or for each run that got something."""
    nbytes: int
    """What each PE of the stage received: of a sum its size, of a gathered value the size of the whole."""
    seconds: float
    """What the stage's threads or processes spent on it, in the mean, waiting for each other included.

    0 of collectives where one thread steps all ranks: they are nodes of its graph."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCounts:
    """What a stage of a replica has done."""

    runs: int
    """Runs: one for each batch, or several where rows of unequal lengths cannot be stepped together."""
    busy_seconds: float
    """How long the runs took."""
    transfers: tuple[TransferCounts, ...]
    """The transfers of every kind that the stage can have."""


def added(counts: Sequence[StageCounts]) -> StageCounts:
    """What several programs have done that run in one stage, one after the other."""
    kinds = dict.fromkeys(one.kind for stage in counts for one in stage.transfers)
    return StageCounts(
        runs=sum(stage.runs for stage in counts),
        busy_seconds=sum(stage.busy_seconds for stage in counts),
        transfers=tuple(
            _added(kind, [one for stage in counts for one in stage.transfers if one.kind == kind]) for kind in kinds
        ),
    )


def _added(kind: TransferKind, transfers: Sequence[TransferCounts]) -> TransferCounts:
    return TransferCounts(
        kind=kind,
        calls=sum(one.calls for one in transfers),
        nbytes=sum(one.nbytes for one in transfers),
        seconds=sum(one.seconds for one in transfers),
    )


class CollectiveMeter:
    """Measures the collectives in the runs of one program: of the kinds `calls` in all.

    Lanes exchange those in `sections`; others are nodes of a segment, and their time is not told from its own. The time
    of a section that has both kinds counts for the kind of which it has more.
    """

    def __init__(self, calls: Sequence[CollectiveKind], sections: Sequence[Sequence[CollectiveKind]]) -> None:
        self.kinds = [_most(section) if section else None for section in sections]
        """For each section the place of its kind in what `begin` gives; None: it has no collectives."""
        counts = [calls.count(kind) for kind in _COLLECTIVES]
        self._present = [(kind, _AT[kind], count) for kind, count in enumerate(counts) if count]
        self._spent: list[list[int]] = []

    def reset(self) -> None:
        """Forgets the threads of the run before."""
        self._spent = []

    def begin(self) -> list[int]:
        """Nanoseconds by kind, for a thread of the run to add to what it spends."""
        spent = [0] * len(_COLLECTIVES)
        self._spent.append(spent)
        return spent

    def count(self, row: Row, nbytes: Sequence[int]) -> None:
        """Adds calls, bytes by kind and times of the run that has ended; a time is the mean of the run's threads."""
        for kind, at, calls in self._present:
            row[at] += calls
            row[at + 1] += nbytes[kind]
            row[at + 2] += sum([spent[kind] for spent in self._spent]) // len(self._spent)


def _most(kinds: Sequence[CollectiveKind]) -> int:
    return max(range(len(_COLLECTIVES)), key=lambda index: kinds.count(_COLLECTIVES[index]))


def kind_index(kind: CollectiveKind) -> int:
    """The place of a collective's kind in what is counted."""
    return _COLLECTIVES.index(kind)


def new_counters(*shape: int) -> Counters:
    """Rows of counters, all 0, in private memory."""
    return np.zeros((*shape, WIDTH), dtype=np.int64)


def rows_of(counters: Counters) -> list[Row]:
    """The rows of `[stages, WIDTH]` counters, to be written: several times faster than through numpy."""
    return [row.data for row in counters]


def count_run(row: Row, started: int) -> None:
    """Counts a run that began at `started` (nanoseconds of `perf_counter_ns`) and has ended just now."""
    row[0] += 1
    row[1] += time.perf_counter_ns() - started


def count_send(row: Row, nbytes: int, nanoseconds: int) -> None:
    """Counts what came from earlier stages for one run."""
    at = _AT[-1]
    row[at] += 1
    row[at + 1] += nbytes
    row[at + 2] += nanoseconds


def merged(counters: Counters) -> Counters:
    """`[stages, WIDTH]` of `[groups, stages, workers, WIDTH]`: workers count alike, their times are averaged."""
    of_workers: Counters = counters.sum(axis=0)
    merged_counts = of_workers[:, 0].copy()
    merged_counts[:, _TIMES] = of_workers[:, :, _TIMES].sum(axis=1) // counters.shape[2]
    return merged_counts


def stage_counts(counters: Counters) -> tuple[StageCounts, ...]:
    """What `[stages, WIDTH]` counters say."""
    return tuple(
        StageCounts(runs=row[0], busy_seconds=row[1] / 1e9, transfers=_transfers(row, first=stage == 0))
        for stage, row in enumerate(counters.tolist())
    )


def _transfers(row: Sequence[int], *, first: bool) -> tuple[TransferCounts, ...]:
    return tuple(
        TransferCounts(kind=kind, calls=row[2 + 3 * index], nbytes=row[3 + 3 * index], seconds=row[4 + 3 * index] / 1e9)
        for index, kind in enumerate(TRANSFERS)
        if not (first and kind == "Send")
    )
