"""Which lane does what between two segments: where each collective's values lie, and the operations that move them.

A small AllReduce is computed by every lane for its own ranks, which costs one barrier. A large one is split between
the lanes, which costs a second. An AllGather is written by each lane for its own ranks before the barrier, and where
the parts are contiguous in the whole, the segments write them there themselves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from furiosa_llm.runtime.artifact.dtypes import Array
from furiosa_llm.runtime.execution.collectives import (
    ArraySum,
    Operation,
    gather_operations,
    gather_slice,
    reduce_operations,
)
from furiosa_llm.runtime.program.lanes import Exchange, Part, Sum, parts_of

SPLIT_NBYTES = 1024 * 1024
"""An AllReduce of this many bytes or more, over all its parts, is split between the lanes.

Measured on prefills with two threads: splitting costs 3 % at 0.1 MiB, nothing at 0.6 MiB, and saves 2 % at 1.1 MiB.
"""


@dataclass(slots=True)
class LaneExchange:
    """One lane's part of a section's collectives.

    `before` runs before the barrier and `after` after it; `late_barrier` says that another barrier follows, because
    lanes read what others have written in `after`.
    """

    before: list[Operation] = field(default_factory=list)
    after: list[Operation] = field(default_factory=list)
    late_barrier: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchanger:
    """Makes the exchanges of one section.

    `arrays` gives by lane and name what the segments make and earlier sections gave, and receives what the exchanges
    give. `allocate(lane, name)` gives a result's memory. The values in `movable`, by lane, come from segments that may
    write them anywhere: theirs in `arrays` may be replaced by places within a result.
    """

    arrays: Sequence[dict[str, Array]]
    allocate: Callable[[int, str], Array]
    movable: Sequence[Collection[str]]

    def make(self, exchanges: Sequence[Exchange]) -> list[LaneExchange]:
        """The part of each lane in `exchanges`."""
        made = [LaneExchange() for _ in self.arrays]
        used = Counter(part for exchange in exchanges for part in parts_of(exchange))
        for exchange in exchanges:
            if exchange.total is not None:
                self._reduce(exchange, exchange.total, used, made)
            else:
                self._gather(exchange, used, made)
        late = any(one.late_barrier for one in made)
        for one in made:
            one.late_barrier = late
        return made

    def _reduce(self, exchange: Exchange, total: Sum, used: Counter[Part], made: Sequence[LaneExchange]) -> None:
        lanes = exchange.lanes
        if isinstance(total, Part) and len(lanes) == 1:
            out = self.allocate(lanes[0], exchange.out)
            self.arrays[lanes[0]][exchange.out] = out
            if self._may_write(total, used) and self.arrays[total.lane][total.name].dtype == out.dtype:
                self.arrays[total.lane][total.name] = out
            else:
                made[lanes[0]].before.extend(reduce_operations(self._array(total), out))
            return
        nbytes = sum(self.arrays[part.lane][part.name].nbytes for part in parts_of(exchange))
        if nbytes >= SPLIT_NBYTES:
            out = self.allocate(lanes[0], exchange.out)
            for index, lane in enumerate(lanes):
                made[lane].after.extend(reduce_operations(self._array(total), out, (index, len(lanes))))
                made[lane].late_barrier = True
                self.arrays[lane][exchange.out] = out
            return
        for lane in lanes:
            out = self.arrays[lane][exchange.out] = self.allocate(lane, exchange.out)
            made[lane].after.extend(reduce_operations(self._array(total), out))

    def _gather(self, exchange: Exchange, used: Counter[Part], made: Sequence[LaneExchange]) -> None:
        out = self.allocate(exchange.lanes[0], exchange.out)
        dim = exchange.call.collective.dim or 0
        for position, part in enumerate(exchange.parts):
            array = self.arrays[part.lane][part.name]
            place = gather_slice(out, position, array.shape[dim], dim)
            if self._may_write(part, used) and place.flags.c_contiguous:
                self.arrays[part.lane][part.name] = place
            else:
                made[part.lane].before.extend(gather_operations(array, position, out, dim))
        for lane in exchange.lanes:
            self.arrays[lane][exchange.out] = out

    def _may_write(self, part: Part, used: Counter[Part]) -> bool:
        """Whether a segment may write `part` elsewhere: nothing but one exchange reads it."""
        return used[part] == 1 and part.name in self.movable[part.lane]

    def _array(self, total: Sum) -> ArraySum:
        if isinstance(total, Part):
            return self.arrays[total.lane][total.name]
        return (self._array(total[0]), self._array(total[1]))
