"""What a step is given of the adapters of its rows.

Where the graph has no rows for adapters, a step has one. Where it has, adapters lie side by side along their ranks, and
a mask keeps from each row the ranks that are not its own: rows of any adapters are one step.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from furiosa_llm.runtime.adapters.adapter import Adapter, key_of
from furiosa_llm.runtime.artifact.adapters.inputs import AdapterInputs
from furiosa_llm.runtime.artifact.dtypes import DTYPES, Array

_MOST_BESIDE = 8
"""Adapters that stay side by side, whether a step needs them or not: more would cost every row."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, weakref_slot=True)
class Beside:
    """Adapters side by side, as arrays for the graph's inputs, and where each of them is, by its key."""

    arrays: Mapping[str, Array]
    sizes: Mapping[str, int]
    spans: Mapping[int, slice]
    adapters: tuple[weakref.ref[Adapter], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StepAdapters:
    """What one step is given; `mask` goes to the input of rows, if there is one."""

    beside: Beside
    mask: Array | None


class AdapterBank:
    """Gives steps their adapters, for all groups of a process. With `apart`, no step has more than one."""

    def __init__(self, inputs: AdapterInputs, *, apart: bool = False) -> None:
        self.inputs = inputs
        self.mixes = inputs.rows is not None and not apart
        self._lock = threading.Lock()
        self._none = Beside(arrays=inputs.base, sizes=inputs.sizes(inputs.base), spans={})
        self._beside = self._none
        self._alone: weakref.WeakKeyDictionary[Adapter, Beside] = weakref.WeakKeyDictionary()

    def of(self, rows: Sequence[Adapter | None]) -> StepAdapters:
        """What a step of these rows is given; if adapters do not mix, all rows have the same."""
        with self._lock:
            beside = self._mixed(rows) if self.mixes else self._one(rows[0])
        return StepAdapters(beside=beside, mask=self._mask(rows, beside))

    def feeds(self, adapter: Adapter | None, *, rows: int) -> dict[str, Array]:
        """The inputs of a step of so many rows that all have `adapter`, by name."""
        given, name = self.of([adapter] * rows), self.inputs.rows
        return {**given.beside.arrays, **({} if name is None or given.mask is None else {name.name: given.mask})}

    def _one(self, adapter: Adapter | None) -> Beside:
        if adapter is None:
            return self._none
        if adapter not in self._alone:
            self._alone[adapter] = self._side_by_side([adapter])
        return self._alone[adapter]

    def _mixed(self, rows: Sequence[Adapter | None]) -> Beside:
        wanted = {key_of(one): one for one in rows if one is not None}
        if not wanted.keys() <= self._beside.spans.keys():
            there = [one for ref in self._beside.adapters if (one := ref()) is not None and one.key not in wanted]
            kept = there[max(0, len(there) + len(wanted) - _MOST_BESIDE) :]
            self._beside = self._side_by_side([*kept, *wanted.values()])
        return self._beside

    def _side_by_side(self, adapters: Sequence[Adapter]) -> Beside:
        if len(adapters) == 1:
            arrays: Mapping[str, Array] = adapters[0].arrays
        else:
            arrays = {
                info.name: np.concatenate([one.arrays[info.name] for one in adapters], axis=_rank_dim(info.shape))
                for info in self.inputs.infos
            }
        spans, start = {}, 0
        for one in adapters:
            stop = start + self._rank(one)
            spans[one.key], start = slice(start, stop), stop
        refs = tuple(weakref.ref(one) for one in adapters)
        return Beside(arrays=arrays, sizes=self.inputs.sizes(arrays), spans=spans, adapters=refs)

    def _rank(self, adapter: Adapter) -> int:
        info = self.inputs.infos[0]
        return int(adapter.arrays[info.name].shape[_rank_dim(info.shape)]) if self.inputs.rows else 0

    def _mask(self, rows: Sequence[Adapter | None], beside: Beside) -> Array | None:
        info = self.inputs.rows
        if info is None:
            return None
        width = beside.sizes[str(info.shape[-1])]
        mask = np.zeros((len(rows), 1, width), dtype=DTYPES[info.dtype].numpy)
        for row, one in enumerate(rows):
            if one is not None:
                mask[row, :, beside.spans[one.key]] = 1
        return mask


def _rank_dim(shape: Sequence[int | str]) -> int:
    """The dimension of an adapter's input along which adapters lie side by side."""
    return next(dim for dim, size in enumerate(shape) if isinstance(size, str))
