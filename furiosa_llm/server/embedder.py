"""An encoder that many clients ask: the texts that wait run together with others of their length, whoever sent them."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from furiosa_llm.runtime.encoder import Encoder, Pair, Vector
from furiosa_llm.runtime.engine.machine_snapshot import MachineSnapshot


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Waiting:
    """A text that waits for its turn. What runs together is for one `run`, and of one length."""

    given: Any
    length: int
    run: Callable[[Sequence[Any]], Sequence[Any]]
    result: Future[Any] = field(default_factory=Future)


class Embedder:
    """A model that makes vectors of texts, or scores of pairs.

    The one that has waited longest runs next, with those of its length that wait behind it: that alters no bit, on the
    models tried, and texts of unequal lengths would have to be filled up.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self._thread = ThreadPoolExecutor(1, "furiosa-encoder")
        self._lock = threading.Lock()
        self._waiting: deque[_Waiting] = deque()
        self._running = 0

    async def vectors(self, rows: Sequence[list[int]]) -> list[Vector]:
        """The vectors of texts, given as `Encoder.tokens` gives them."""
        return await self._all(rows, [len(row) for row in rows], self.encoder.vectors)

    async def scores(self, pairs: Sequence[Pair]) -> list[float]:
        """The scores of pairs; only of a model that has them."""
        return await self._all(pairs, [len(pair.token_ids) for pair in pairs], self.encoder.scores)

    def machine(self) -> MachineSnapshot:
        """What lies on every PE, and what was done so far; texts run and wait."""
        return self.encoder.machine(running=self._running, waiting=len(self._waiting))

    def close(self) -> None:
        """Ends the threads; what runs fails, and what waits is cancelled."""
        self.encoder.close()
        self._thread.shutdown(cancel_futures=True)
        with self._lock:
            for text in self._waiting:
                text.result.cancel()

    async def _all(self, given: Sequence[Any], lengths: Sequence[int], run: Callable[[Any], Any]) -> list[Any]:
        """What comes of all of them; those that have not begun when this is cancelled, or one fails, are dropped."""
        texts = [_Waiting(given=one, length=size, run=run) for one, size in zip(given, lengths, strict=True)]
        with self._lock:
            self._waiting.extend(texts)
        for _ in texts:  # as many as are needed if none runs together
            self._thread.submit(self._step)
        try:
            return await asyncio.gather(*(asyncio.wrap_future(text.result) for text in texts))
        finally:
            for text in texts:
                text.result.cancel()

    def _step(self) -> None:
        """Runs one batch, if anything waits."""
        batch = self._take()
        try:
            results = batch[0].run([text.given for text in batch]) if batch else []
        except BaseException as error:  # noqa: BLE001 - which those get who wait for it
            for text in batch:
                text.result.set_exception(error)
        else:
            for text, result in zip(batch, results, strict=True):
                text.result.set_result(result)
        self._running = 0

    def _take(self) -> list[_Waiting]:
        with self._lock:
            wanted = [text for text in self._waiting if not text.result.cancelled()]
            fitting = (text for text in wanted if (text.length, text.run) == (wanted[0].length, wanted[0].run))
            chosen = list(itertools.islice(fitting, self.encoder.batch_size))
            left = set(wanted).difference(chosen)
            self._waiting = deque(text for text in wanted if text in left)
            batch = [text for text in chosen if text.result.set_running_or_notify_cancel()]
            self._running = len(batch)
            return batch
