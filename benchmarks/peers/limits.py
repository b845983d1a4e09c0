"""The bars of the comparison: this project's time for a token over that of a peer with the same weights."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from benchmarks.artifacts import LARGE_INT4
from benchmarks.bars import Bar
from benchmarks.peers.contenders import FLOAT32, FOUR_BITS, LARGE_FOUR_BITS, OURS
from benchmarks.peers.measuring import Measured, Results
from benchmarks.peers.table import median_ratio, tokens_per_second

_PLAIN, _GENAI, _LLAMA = "onnxruntime", "onnxruntime-genai", "llama.cpp"
_STREAMS = 1 / 1.2


@dataclass(frozen=True, slots=True, kw_only=True)
class _Limit:
    """What this project may take on some PEs, over what a peer takes for the same model."""

    numbers: str
    model: str
    size: int
    peer: str
    figure: str
    limit: float


_LIMITS = [
    _Limit(numbers=numbers, model=model, size=size, peer=peer, figure=figure, limit=limit)
    for numbers, model, size, peer, figure, limit in (
        (LARGE_FOUR_BITS, LARGE_INT4, 4, _PLAIN, "decode", 0.95),
        (LARGE_FOUR_BITS, LARGE_INT4, 8, _PLAIN, "decode", 0.95),
        (LARGE_FOUR_BITS, LARGE_INT4, 4, _PLAIN, "prefill", 1.0),
        (LARGE_FOUR_BITS, LARGE_INT4, 4, _PLAIN, "first", 1.0),
        (LARGE_FOUR_BITS, LARGE_INT4, 4, _PLAIN, "eight", 0.6),
        (LARGE_FOUR_BITS, LARGE_INT4, 8, _PLAIN, "eight", 0.6),
        (LARGE_FOUR_BITS, LARGE_INT4, 4, _GENAI, "at_once", _STREAMS),
        (LARGE_FOUR_BITS, LARGE_INT4, 4, _LLAMA, "at_once", _STREAMS),
        (FLOAT32, "genai-fp32", 4, _PLAIN, "decode", 1.15),
        (FLOAT32, "genai-fp32", 8, _PLAIN, "decode", 1.3),
        (FOUR_BITS, "int4", 4, _PLAIN, "decode", 1.3),
        (FOUR_BITS, "int4", 8, _PLAIN, "decode", 1.6),
        (FOUR_BITS, "int4", 4, _PLAIN, "at_once", 1.0),
    )
]


def bars(results: Mapping[str, Results]) -> Iterator[Bar]:
    """The ratios that have bars, of what was measured."""
    for limit in _LIMITS:
        rows = results[limit.numbers].measured if limit.numbers in results else []
        ours = _row(rows, OURS, f"{limit.model}, {limit.size} PEs")
        theirs = _row(rows, limit.peer, limit.model)
        if ours is not None and theirs is not None:
            speeds = [tokens_per_second(one)[limit.figure] for one in (theirs, ours)]
            middles = " / ".join(f"{statistics.median(one):.3g}" for one in speeds[::-1])
            yield Bar(
                what=f"{ours.contender.what}: {limit.figure}, time over {limit.peer}'s",
                figure=median_ratio(*speeds),
                limit=limit.limit,
                unit="x",
                beside=f"{middles} tokens/s",
            )


def _row(rows: list[Measured], peer: str, what: str) -> Measured | None:
    return next((one for one in rows if one.contender.peer == peer and one.contender.what.startswith(what)), None)
