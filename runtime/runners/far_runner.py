"""What runners share whose replica is elsewhere, in other processes or on other hosts: what is under way, its end."""

from __future__ import annotations

import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from furiosa_llm.runtime.adapters.adapter import Adapter
from furiosa_llm.runtime.errors import WorkerError
from furiosa_llm.runtime.runners.batch import Batch, adapters_of


class UnderWay(Protocol):
    """A batch under way."""

    def fail(self, error: Exception) -> None:
        """Gives whoever waits for it the error."""
        ...


Entry = TypeVar("Entry", bound=UnderWay)


class FarRunner(ABC, Generic[Entry]):
    """Fails once, with all that is under way, and tells who watches; knows which adapters are on the other side."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way: dict[int, Entry] = {}
        self._error: Exception | None = None
        self._on_failure: Callable[[Exception], None] | None = None
        self._adapters: weakref.WeakValueDictionary[int, Adapter] = weakref.WeakValueDictionary()
        self._sent: set[int] = set()

    def watch(self, on_failure: Callable[[Exception], None]) -> None:
        """Has `on_failure` called with the error when the runner fails, or at once; not when it is closed before."""
        with self._lock:
            self._on_failure = on_failure
            error = self._error
        if error is not None:
            on_failure(error)

    def close(self) -> None:
        """Ends what runs elsewhere; what is under way fails."""
        with self._lock:
            self._on_failure = None
        self._fail(WorkerError("the runner is closed"))

    def _fail(self, error: Exception) -> None:
        with self._lock:
            if self._error is not None:
                return
            self._error = error
            on_failure = self._on_failure
            lost, self._under_way = list(self._under_way.values()), {}
        self._stop()
        for entry in lost:
            entry.fail(error)
        if on_failure is not None:
            on_failure(error)

    @abstractmethod
    def _stop(self) -> None:
        """Has everything end that runs elsewhere, without waiting for it."""

    def _changed_adapters(self, batch: Batch) -> tuple[list[int], list[Adapter]]:
        """What is to be said before `batch`: the keys of adapters that are gone, and the new ones that are in it."""
        gone = self._sent - set(self._adapters)
        new = [one for one in adapters_of(batch) if one.key not in self._sent]
        self._adapters.update({one.key: one for one in new})
        self._sent = self._sent - gone | {one.key for one in new}
        return sorted(gone), new
