"""What the processes of a replica share: memory in one arena, barriers, where each of them is and what it counts."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from furiosa_llm.runtime.artifact.dtypes import Array
from furiosa_llm.runtime.execution.counters import WIDTH, Counters
from furiosa_llm.runtime.execution.driver import Body
from furiosa_llm.runtime.execution.memory import Block

_GROUP_NBYTES = 1 << 34
"""The part of the arena that each group has; pages that nobody touches take no memory."""
_HEADER_NBYTES = 1 << 20
_ALIGNMENT = 4096


class Arena:
    """Memory that several processes see at once: a header of positions and counters, then a part for each group.

    Each process makes the same allocations in the same order within a group, and so finds the same places without
    asking. Nothing is given back before the arena ends.
    """

    def __init__(self, descriptor: int, groups: int) -> None:
        """Maps the arena in the file `descriptor`, which `create` has made."""
        nbytes = _HEADER_NBYTES + groups * _GROUP_NBYTES
        self._memory = mmap.mmap(descriptor, nbytes)
        self._bytes: npt.NDArray[np.uint8] = np.frombuffer(self._memory, dtype=np.uint8)
        self._next = [_HEADER_NBYTES + group * _GROUP_NBYTES for group in range(groups)]

    @staticmethod
    def create(groups: int) -> int:
        """A file in memory for an arena; children may inherit it."""
        descriptor = os.memfd_create("furiosa-arena", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, _HEADER_NBYTES + groups * _GROUP_NBYTES)
        return descriptor

    def positions(self, groups: int, stages: int, workers: int) -> npt.NDArray[np.int64]:
        """`[groups, stages, workers]`: the section that each worker is in, -1 if it is in none."""
        return self._header(groups * stages * workers)[..., 0].reshape(groups, stages, workers)

    def counters(self, groups: int, stages: int, workers: int) -> Counters:
        """`[groups, stages, workers, WIDTH]`: what each worker counts, by itself; zeros at first."""
        return self._header(groups * stages * workers)[..., 1:].reshape(groups, stages, workers, WIDTH)

    def _header(self, count: int) -> npt.NDArray[np.int64]:
        """A row for each worker in each stage and group: its position, then its counters."""
        nbytes = count * (1 + WIDTH) * 8
        if nbytes > _HEADER_NBYTES:
            raise ValueError(f"positions and counters of {count} stages of workers do not fit the arena's header")
        return self._bytes[:nbytes].view(np.int64).reshape(count, 1 + WIDTH)

    def allocate(self, group: int, nbytes: int) -> Block:
        """The next `nbytes` of the part of `group`; twice as many are set apart, for the next need is often greater."""
        start = self._next[group]
        self._next[group] = start + -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        if self._next[group] > _HEADER_NBYTES + (group + 1) * _GROUP_NBYTES:
            raise MemoryError(f"the steps of a group need more than the {_GROUP_NBYTES >> 30} GiB of its arena")
        return Block.over(self._bytes[start : start + nbytes])

    def place_of(self, array: Array) -> int | None:
        """How far into the arena the contiguous `array` begins; None if it lies elsewhere."""
        offset = array.ctypes.data - self._bytes.ctypes.data
        inside = 0 <= offset <= self._bytes.size - array.nbytes
        return offset if inside and array.flags.c_contiguous else None

    def array(self, offset: int, dtype: np.dtype[np.generic], shape: tuple[int, ...]) -> Array:
        """The array at `offset`."""
        count = int(np.prod(shape)) * dtype.itemsize
        return self._bytes[offset : offset + count].view(dtype).reshape(shape)


class ProcessBarrier:
    """A barrier between processes, made of one semaphore for each ordered pair of them.

    A process that dies leaves the others waiting: whoever watches over them ends them.
    """

    def __init__(self, descriptors: Sequence[Sequence[int]], member: int) -> None:
        """`descriptors[sender][receiver]` are event descriptors that count; `member` is this process."""
        self._outbox = [fd for receiver, fd in enumerate(descriptors[member]) if receiver != member]
        self._inbox = [row[member] for sender, row in enumerate(descriptors) if sender != member]

    @staticmethod
    def create(members: int) -> list[list[int]]:
        """Event descriptors for a barrier of `members` processes, -1 where one would wait for itself."""
        return [
            [os.eventfd(0, os.EFD_SEMAPHORE) if sender != receiver else -1 for receiver in range(members)]
            for sender in range(members)
        ]

    def wait(self, _: int) -> None:
        """Returns when every process has called this as often as this one has."""
        for descriptor in self._outbox:
            os.eventfd_write(descriptor, 1)
        for descriptor in self._inbox:
            os.eventfd_read(descriptor)


class ProcessLane:
    """Steps this process's lane, in step with the lanes of the others; stands where a `Crew` stands for threads."""

    def __init__(self, barrier: ProcessBarrier) -> None:
        self._barrier = barrier

    def run(self, body: Body, lanes: int) -> None:
        """Calls `body` for all of this process's lanes."""
        body(range(lanes), 0, self._barrier)
