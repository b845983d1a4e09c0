"""Which thread does what between two segments: where each collective's values lie, and the operations that move them.

A small AllReduce is computed by every thread for its own ranks, which costs one barrier. A large one is split between
the threads, which costs a second. An AllGather is written by each thread for its own ranks before the barrier, and
where the parts are contiguous in the whole, the segments write them there themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from furiosa_llm.runtime.artifact.layout import Mesh
from furiosa_llm.runtime.collectives import Operation, gather_operations, gather_slice, reduce_operations
from furiosa_llm.runtime.driver import thread_of
from furiosa_llm.runtime.ort import Array
from furiosa_llm.runtime.program import CollectiveCall

SPLIT_NBYTES = 1024 * 1024
"""An AllReduce of this many bytes or more, over all its parts, is split between the threads.

Measured on prefills with two threads: splitting costs 3 % at 0.1 MiB, nothing at 0.6 MiB, and saves 2 % at 1.1 MiB.
"""


@dataclass(slots=True)
class ThreadExchange:
    """One thread's part of a step's collectives.

    `before` runs before the barrier and `after` behind it; `late_barrier` says that another barrier follows, because
    threads read what others have written in `after`.
    """

    before: list[Operation] = field(default_factory=list)
    after: list[Operation] = field(default_factory=list)
    late_barrier: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchanger:
    """Makes the exchanges of a mesh whose ranks are stepped by `threads` threads."""

    mesh: Mesh
    threads: int

    def make(
        self,
        calls: Sequence[CollectiveCall],
        arrays: Sequence[dict[str, Array]],
        allocate: Callable[[int, str], Array],
        written_in_place: frozenset[str],
    ) -> list[ThreadExchange]:
        """The exchange of each thread for the collectives `calls` of one step.

        `arrays` gives the inputs by rank and name, and receives the outputs. `allocate(rank, name)` gives an output's
        memory in a rank's block. The inputs `written_in_place` come from segments that may write them anywhere: theirs
        in `arrays` may be replaced by places within the output.
        """
        exchanges = [ThreadExchange() for _ in range(self.threads)]
        for call in calls:
            for group in self.mesh.groups(call.collective.axes):
                if call.collective.kind == "AllReduce":
                    self._reduce(call, group, arrays, allocate, exchanges)
                else:
                    self._gather(call, group, arrays, allocate, written_in_place, exchanges)
        late = any(exchange.late_barrier for exchange in exchanges)
        for exchange in exchanges:
            exchange.late_barrier = late
        return exchanges

    def _reduce(
        self,
        call: CollectiveCall,
        group: Sequence[int],
        arrays: Sequence[dict[str, Array]],
        allocate: Callable[[int, str], Array],
        exchanges: Sequence[ThreadExchange],
    ) -> None:
        parts = [arrays[rank][call.input] for rank in group]
        members = self._members(group)
        if len(members) > 1 and parts[0].nbytes * len(parts) >= SPLIT_NBYTES:
            out = allocate(group[0], call.output)
            for index, thread in enumerate(members):
                exchanges[thread].after.extend(reduce_operations(parts, out, (index, len(members))))
                exchanges[thread].late_barrier = True
            for rank in group:
                arrays[rank][call.output] = out
            return
        for thread, ranks in members.items():
            out = allocate(ranks[0], call.output)
            exchanges[thread].after.extend(reduce_operations(parts, out))
            for rank in ranks:
                arrays[rank][call.output] = out

    def _gather(
        self,
        call: CollectiveCall,
        group: Sequence[int],
        arrays: Sequence[dict[str, Array]],
        allocate: Callable[[int, str], Array],
        written_in_place: frozenset[str],
        exchanges: Sequence[ThreadExchange],
    ) -> None:
        out = allocate(group[0], call.output)
        dim = call.collective.dim or 0
        for position, rank in enumerate(group):
            part = arrays[rank][call.input]
            place = gather_slice(out, position, part.shape[dim], dim)
            if call.input in written_in_place and place.flags.c_contiguous:
                arrays[rank][call.input] = place
            else:
                exchange = exchanges[thread_of(rank, self.mesh.size, self.threads)]
                exchange.before.extend(gather_operations(part, position, out, dim))
        for rank in group:
            arrays[rank][call.output] = out

    def _members(self, group: Sequence[int]) -> Mapping[int, list[int]]:
        """The ranks of `group` by the thread that steps them."""
        members: dict[int, list[int]] = {}
        for rank in group:
            members.setdefault(thread_of(rank, self.mesh.size, self.threads), []).append(rank)
        return members
