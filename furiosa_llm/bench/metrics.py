"""What a load says of an engine, in the field's words: TTFT, TPOT, ITL, end-to-end latency, throughput, goodput."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from furiosa_llm.bench.load import Observed, Record


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """How a latency is spread over requests, or for ITL over tokens; in milliseconds, None if there is none."""

    mean: float | None
    p50: float | None
    p90: float | None
    p99: float | None
    max: float | None

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread:
        """The distribution of `seconds`."""
        if not seconds:
            return cls(mean=None, p50=None, p90=None, p99=None, max=None)
        values = np.asarray(seconds) * 1000
        p50, p90, p99 = np.percentile(values, (50, 90, 99)).tolist()
        return cls(mean=float(values.mean()), p50=p50, p90=p90, p99=p99, max=float(values.max()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """The figures of one load. Tokens and latencies are of requests that were completed."""

    duration: float
    """Seconds from the first request until the last one ended."""
    completed: int
    """Requests that ended whole."""
    failed: int
    """Requests that did not."""
    max_concurrency: int
    """The most requests that were under way at once."""
    input_tokens: int
    """Tokens of prompts."""
    output_tokens: int
    """Tokens of completions."""
    request_throughput: float
    """Requests completed a second."""
    output_throughput: float
    total_throughput: float
    """`output_throughput`, `total_throughput`: tokens a second; the total counts prompts too."""
    goodput: float | None
    """Requests a second that kept every objective; None if there was none."""
    ttft: Spread
    """Time to the first token, since the request was due."""
    tpot: Spread
    """Time per output token after the first one, the mean of a request that has two or more."""
    itl: Spread
    """Inter-token latency, between a token and the one before it."""
    e2el: Spread
    """End-to-end latency, until the request's last output."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON; latencies are under their names, each with its statistics, in milliseconds."""
        return asdict(self)


def figures_of(observed: Observed, objectives: Mapping[str, float]) -> Figures:
    """The figures of a load; `objectives` has limits in milliseconds under the names in `OBJECTIVES`."""
    done = [record for record in observed.records if record.error is None]
    duration = observed.duration
    prompts = sum(record.num_prompt for record in done)
    tokens = sum(len(record.token_times) for record in done)
    good = sum(_keeps(record, objectives) for record in done)
    return Figures(
        duration=duration,
        completed=len(done),
        failed=len(observed.records) - len(done),
        max_concurrency=observed.max_concurrency,
        input_tokens=prompts,
        output_tokens=tokens,
        request_throughput=len(done) / duration,
        output_throughput=tokens / duration,
        total_throughput=(prompts + tokens) / duration,
        goodput=good / duration if objectives else None,
        ttft=Spread.of(_known(_ttft(record) for record in done)),
        tpot=Spread.of(_known(_tpot(record) for record in done)),
        itl=Spread.of([gap for record in done for gap in _gaps(record)]),
        e2el=Spread.of(_known(_e2el(record) for record in done)),
    )


def latencies(observed: Observed) -> dict[str, list[float]]:
    """All latencies of the requests that were completed, in milliseconds, by their names; for plots."""
    done = [record for record in observed.records if record.error is None]
    found = {
        "ttft": _known(_ttft(record) for record in done),
        "tpot": _known(_tpot(record) for record in done),
        "itl": [gap for record in done for gap in _gaps(record)],
        "e2el": _known(_e2el(record) for record in done),
    }
    return {name: [1000 * second for second in seconds] for name, seconds in found.items()}


def beside(predicted: Figures, measured: Figures) -> dict[str, dict[str, float]]:
    """The means of latencies in milliseconds, and the tokens a second: predicted, measured, and the relative error."""
    pairs = {name: (getattr(predicted, name).mean, getattr(measured, name).mean) for name in ("ttft", "tpot", "e2el")}
    pairs["output_throughput"] = predicted.output_throughput, measured.output_throughput
    known = {name: (said, was) for name, (said, was) in pairs.items() if said is not None and was}
    return {name: {"predicted": said, "measured": was, "error": said / was - 1} for name, (said, was) in known.items()}


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _ttft(record: Record) -> float | None:
    return record.token_times[0] - record.due if record.token_times else None


def _tpot(record: Record) -> float | None:
    times = record.token_times
    return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None


def _e2el(record: Record) -> float | None:
    return None if record.ended is None else record.ended - record.due


def _gaps(record: Record) -> list[float]:
    return [after - before for before, after in zip(record.token_times, record.token_times[1:], strict=False)]


def _keeps(record: Record, objectives: Mapping[str, float]) -> bool:
    found = {"ttft": _ttft(record), "tpot": _tpot(record), "e2el": _e2el(record)}
    # A completion of one token has no TPOT, and breaks no limit of it.
    return all((found[name] or 0.0) * 1000 <= limit for name, limit in objectives.items())
