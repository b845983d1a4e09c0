"""What the requests of the last minute had of the server, beside what was expected of its machine."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from furiosa_llm.simulate.errors import PlacementError

if TYPE_CHECKING:
    from furiosa_llm.simulate.closed_form import Estimate

WINDOW = 60.0
"""Seconds that a request counts for once it has ended."""
_MOST = 256
"""Requests that are kept: the last ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """What had been done when a request began."""

    time: float
    running: float
    """The integral of the sequences under way."""
    tokens: int
    sequences: int
    """Of the request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ended:
    time: float
    seconds: float
    ttft: float
    tpot: float | None
    """None for a single token."""
    prompt: int
    generated: float
    running: float
    """While it ran, integrated."""
    tokens: int
    """Of all requests, while it ran."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecentLoad:
    """The means of the requests that ended in the last minute. Times in seconds."""

    requests: int
    concurrency: float
    """Sequences under way, in the mean over the lives of these requests."""
    prompt_tokens: float
    """Of a prompt, less those that the prefix cache had."""
    generated_tokens: float
    """Of a completion."""
    ttft: float
    tpot: float | None
    """None if every completion is one token."""
    output_tps: float
    """Tokens a second of all requests, in the mean over the lives of these."""


class LoadMeter:
    """Follows the requests of a server: each begins, has tokens and ends; what it costs does not grow with them."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last, self._sequences, self._running, self._tokens = clock(), 0, 0.0, 0
        self._ended: deque[_Ended] = deque(maxlen=_MOST)

    def begin(self, sequences: int) -> Mark:
        """A request of so many sequences."""
        now = self._advance()
        self._sequences += sequences
        return Mark(time=now, running=self._running, tokens=self._tokens, sequences=sequences)

    def count(self, tokens: int) -> None:
        """Tokens that came, of any request."""
        self._tokens += tokens

    def leave(self, mark: Mark) -> None:
        """The request of `mark` ends, whole or not."""
        self._advance()
        self._sequences -= mark.sequences

    def served(self, mark: Mark, *, first: float, last: float, prompt: int, generated: int) -> None:
        """The request of `mark` had its first token and its last one at these times."""
        self._advance()
        each = generated / mark.sequences
        self._ended.append(
            _Ended(
                time=self._last,
                seconds=self._last - mark.time,
                ttft=first - mark.time,
                tpot=(last - first) / (each - 1) if each > 1 else None,
                prompt=max(prompt, 1),
                generated=max(each, 1.0),
                running=self._running - mark.running,
                tokens=self._tokens - mark.tokens,
            )
        )

    def read(self) -> RecentLoad | None:
        """Of the last minute; None if no request ended in it."""
        since = self._clock() - WINDOW
        found = [one for one in self._ended if one.time >= since and one.seconds > 0]
        if not found:
            return None
        seconds = sum(one.seconds for one in found)
        tpots = [one.tpot for one in found if one.tpot is not None]
        return RecentLoad(
            requests=len(found),
            concurrency=max(sum(one.running for one in found) / seconds, 1.0),
            prompt_tokens=statistics.fmean(one.prompt for one in found),
            generated_tokens=statistics.fmean(one.generated for one in found),
            ttft=statistics.fmean(one.ttft for one in found),
            tpot=statistics.fmean(tpots) if tpots else None,
            output_tps=sum(one.tokens for one in found) / seconds,
        )

    def _advance(self) -> float:
        now = self._clock()
        self._running += self._sequences * (now - self._last)
        self._last = now
        return now


class Expectation:
    """What a device file says of loads like the recent one; computed beside the event loop, once for each load."""

    def __init__(self, device: str, predict: Callable[[float, float, float], Estimate]) -> None:
        """`predict` takes the requests under way and the tokens of a prompt and of a completion."""
        self.device = device
        self._predict = predict
        self._asked: tuple[float, float, float] | None = None
        self._said: Estimate | None = None

    async def of(self, load: RecentLoad) -> Estimate | None:
        """None if such requests have no room, by the device file."""
        asked = round(load.concurrency, 1), float(round(load.prompt_tokens)), float(round(load.generated_tokens))
        if asked != self._asked:
            self._said = await asyncio.to_thread(self._estimate, *asked)
            self._asked = asked
        return self._said

    def _estimate(self, concurrency: float, prompt: float, generated: float) -> Estimate | None:
        try:
            return self._predict(concurrency, prompt, generated)
        except PlacementError:
            return None
