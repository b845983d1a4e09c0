"""What a simulated load is made of: requests with lengths and arrivals, from a trace or drawn with a seed."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from furiosa_llm.simulate.errors import LoadError, TraceError

_MOST_NBYTES = 2**28
_MOST_TOKENS = 2**24
_MOST_SECONDS = 1e12
"""Beyond them a time has no microseconds, and later no seconds."""
LENGTHS = {
    "sharegpt": (
        (
            262,
            318,
            363,
            399,
            436,
            479,
            522,
            573,
            621,
            674,
            732,
            782,
            835,
            914,
            1019,
            1104,
            1218,
            1341,
            1479,
            1826,
            2400,
        ),
        (512, 521, 531, 541, 550, 561, 574, 583, 592, 609, 632, 668, 701, 728, 754, 764, 768, 769, 769, 770, 772),
    ),
}
"""The quantiles, in steps of a twentieth, of prompts and completions: what a drawn length is interpolated between."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request."""

    arrival: float
    """Seconds from the start; of no meaning in a closed loop."""
    input_len: int
    output_len: int


def read_trace(path: Path) -> list[Request]:
    """The requests of a file of JSON Lines, by arrival. Raises TraceError, which names the line."""
    try:
        if path.exists() and not path.is_file():
            raise TraceError(f"the trace {path} is no file; give one of JSON Lines")
        if path.stat().st_size > _MOST_NBYTES:
            raise TraceError(f"{path} has more than {_MOST_NBYTES} bytes; give a part of the trace")
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:  # a name with a NUL, and bytes that are no UTF-8
        raise TraceError(f"the trace {path} cannot be read: {error}") from error
    found = [_request(line, f"{path} line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise TraceError(f"{path} has no request; write one JSON object a line")
    first = min(one.arrival for one in found)
    moved = [Request(arrival=r.arrival - first, input_len=r.input_len, output_len=r.output_len) for r in found]
    return sorted(moved, key=lambda one: one.arrival)


def _request(line: str, where: str) -> Request:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TraceError(f"{where} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise TraceError(f"{where} is {found!r:.60}, expected an object")
    return Request(
        arrival=_number(found, "arrival_time", where),
        input_len=_count(found, "input_toks", where),
        output_len=_count(found, "output_toks", where),
    )


def _number(found: dict[str, Any], key: str, where: str) -> float:
    value = found.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _MOST_SECONDS:
        raise TraceError(f"{where}: {key} is {value!r:.60}, expected seconds, at most {_MOST_SECONDS:g}")
    return float(value)


def _count(found: dict[str, Any], key: str, where: str) -> int:
    value = found.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= _MOST_TOKENS:
        raise TraceError(f"{where}: {key} is {value!r:.60}, expected a number of tokens, from 1 to {_MOST_TOKENS}")
    return value


def drawn(
    count: int, *, input_len: float, output_len: float, lengths: str | None, rate: float | None, seed: int
) -> list[Request]:
    """`count` requests of these lengths, or drawn from `lengths`; with a rate they arrive as a Poisson process.

    The same seed gives the same requests, and the same lengths at every rate.
    """
    if count < 1:
        raise LoadError(f"there are {count} requests, expected at least 1")
    if rate is not None and not 0 < rate < math.inf:
        raise LoadError(f"{rate:g} requests a second arrive, expected a number above 0")
    sizes, gaps = np.random.default_rng([seed, 0]), np.random.default_rng([seed, 1])
    if lengths is None:
        inputs, outputs = [round(input_len)] * count, [round(output_len)] * count
    else:
        inputs, outputs = (_from_quantiles(sizes.random(count), table) for table in LENGTHS[lengths])
    times = [0.0] * count
    if rate is not None:
        times = [0.0, *np.cumsum(gaps.exponential(1 / rate, count - 1)).tolist()]
    return [
        Request(arrival=arrival, input_len=into, output_len=out)
        for arrival, into, out in zip(times, inputs, outputs, strict=True)
    ]


def _from_quantiles(shares: np.ndarray[Any, np.dtype[np.float64]], table: Sequence[int]) -> list[int]:
    return [round(value) for value in np.interp(shares, np.linspace(0, 1, len(table)), table).tolist()]
