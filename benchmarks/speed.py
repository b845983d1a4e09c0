"""Decode and prefill on what serves against plain onnxruntime on the same cores, alternated in one process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

from benchmarks.artifacts import SYNTHETIC, SYNTHETIC_1B, artifact, stored_weights
from benchmarks.bars import Bar
from benchmarks.stepping import (
    PAST,
    Served,
    Stepped,
    alternate,
    decode_milliseconds,
    plain,
    prefill_milliseconds,
    ratio,
    replicas,
)

ROUNDS = 20
_ROUNDS_OF_LARGE = 10
_LONG_PREFILL = 512

LIMITS: dict[tuple[str, int], tuple[float | None, float | None]] = {
    ("genai-fp32", 4): (1.2, 1.25),
    ("genai-fp32", 8): (1.4, 1.45),
    ("int4", 4): (1.7, None),
    ("int4", 8): (2.3, None),
    ("optimum-fp32", 4): (None, None),
    ("optimum-fp32", 8): (None, None),
    (SYNTHETIC, 4): (1.15, 1.15),
    (SYNTHETIC, 8): (1.2, 1.2),
}
"""Model and tensor parallel size -> the greatest ratio for a decode step and for a prefill of 128 tokens."""

PREFILL_LIMITS: dict[tuple[str, int], float | None] = {
    ("genai-fp32", 4): 1.2,
    ("genai-fp32", 8): 1.35,
    (SYNTHETIC, 4): 1.1,
    (SYNTHETIC, 8): 1.15,
}
"""The same for a prefill of 512 tokens."""

LARGE_LIMITS: dict[tuple[str, int], float] = {(SYNTHETIC_1B, 8): 1.15}
"""The same for a decode step of a model of 4.4 GB."""


def bars() -> Iterator[Bar]:
    """Two ratios for every model and size."""
    for (name, size), (decode_limit, prefill_limit) in LIMITS.items():
        with _sides(name, size) as sides:
            yield _decode(name, size, sides, decode_limit)
            yield from _prefill(name, size, sides, PAST, {"served": prefill_limit})


def prefill_bars() -> Iterator[Bar]:
    """Prefills of 512 tokens: with the logits of all positions, as plain onnxruntime gives, and as an engine asks."""
    for (name, size), limit in PREFILL_LIMITS.items():
        with _sides(name, size) as sides:
            yield from _prefill(name, size, sides, _LONG_PREFILL, {"served": limit, "served, last logits alone": None})


def large_bars() -> Iterator[Bar]:
    """A decode step of a large model; model and artifact take 9 GB of disk, and stay there until `make clean`."""
    for (name, size), limit in LARGE_LIMITS.items():
        with _sides(name, size) as sides:
            yield _decode(name, size, sides, limit, rounds=_ROUNDS_OF_LARGE)


@contextmanager
def _sides(name: str, size: int) -> Iterator[dict[str, Stepped]]:
    """What is compared: replicas of one artifact, and its model on plain onnxruntime."""
    built = artifact(name, size)
    with replicas(built) as make_runner:
        yield {
            "served": Served(make_runner(1)),
            "served, last logits alone": Served(make_runner(1), logits="last"),
            "plain": plain(built, length=_LONG_PREFILL),
        }


def _decode(name: str, size: int, sides: Mapping[str, Stepped], limit: float | None, *, rounds: int = ROUNDS) -> Bar:
    measures = {side: partial(decode_milliseconds, sides[side]) for side in ("served", "plain")}
    what = f"{name} tp {size}: decode step, past {PAST} / plain onnxruntime"
    beside = stored_weights(artifact(name, size))
    return ratio(what, alternate(measures, rounds), "served", "plain", limit=limit, beside=beside)


def _prefill(
    name: str, size: int, sides: Mapping[str, Stepped], count: int, limits: Mapping[str, float | None]
) -> Iterator[Bar]:
    """A ratio for each side with a limit, or None for one."""
    measures = {side: partial(prefill_milliseconds, sides[side], count) for side in (*limits, "plain")}
    times = alternate(measures, ROUNDS)
    for side, limit in limits.items():
        how = side.removeprefix("served")
        yield ratio(f"{name} tp {size}: prefill of {count}{how} / plain onnxruntime", times, side, "plain", limit=limit)
