"""What was measured, as the Markdown that goes into docs/benchmarks.md and as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.peers.measuring import Measured, Results

_HEADER = (
    *("engine", "model", "how", "decode, tokens/s", "prefill, tokens/s", "8 prompts, tokens/s"),
    *("decode of 8, tokens/s", "4 at once, tokens/s", "16 at once, tokens/s"),
    *("load, s", "peak memory, MB", "tokens like the first row's"),
)


def markdown(machine: Mapping[str, str], results: Mapping[str, Results], rounds: int) -> str:
    """A table for each numeric class, then who was left out and why."""
    lines = [f"{_machine(machine)} {rounds} rounds.", ""]
    for numbers, found in results.items():
        lines += [f"### {numbers[:1].upper()}{numbers[1:]}", "", _row(_HEADER), _row(["---"] * len(_HEADER))]
        lines += [_row(_cells(one, found.measured[0], found.compared)) for one in found.measured]
        lines.append("")
    skipped = {name: reason for found in results.values() for name, reason in found.skipped.items()}
    lines += ["Not measured:", "", *(f"* {name}: {reason}" for name, reason in skipped.items()), ""] if skipped else []
    return "\n".join(lines)


def as_json(machine: Mapping[str, str], results: Mapping[str, Results], rounds: int) -> dict[str, Any]:
    """Every figure of every round."""
    return {
        "machine": dict(machine),
        "rounds": rounds,
        "classes": {
            numbers: {
                "compared_tokens": found.compared,
                "measured": [_figures(one) for one in found.measured],
                "skipped": found.skipped,
            }
            for numbers, found in results.items()
        },
    }


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median over rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def tokens_per_second(one: Measured) -> dict[str, list[float]]:
    """What was measured in each round, by what was asked for."""
    return {
        "decode": one.decode,
        "prefill": one.prefill,
        "first": one.first,
        "eight": one.eight,
        "four": one.four,
        "at_once": one.at_once,
    }


def _figures(one: Measured) -> dict[str, Any]:
    return {
        "peer": one.contender.peer,
        "what": one.contender.what,
        **asdict(one.loaded),
        **tokens_per_second(one),
        "agreeing": one.agreeing,
        "peak_nbytes": one.peak_nbytes,
    }


def _cells(one: Measured, first: Measured, compared: int) -> list[str]:
    return [
        f"{one.contender.peer} {one.loaded.version}",
        one.contender.what,
        one.loaded.how,
        *map(_speed, tokens_per_second(one).values(), tokens_per_second(first).values()),
        f"{one.loaded.seconds:.1f}",
        f"{one.peak_nbytes / 1e6:.0f}",
        f"{one.agreeing} of {compared}",
    ]


def _speed(figures: Sequence[float], first: Sequence[float]) -> str:
    """The median, and its ratio to that of the table's first row."""
    middle = statistics.median(figures)
    digits = 0 if round(middle) >= 100 else 1
    return f"{middle:.{digits}f} ({median_ratio(figures, first):.2f}x)"


def _machine(machine: Mapping[str, str]) -> str:
    return (
        f"{machine['cores']} cores of {machine['cpu']} ({machine['instructions']}), {machine['memory']}, "
        f"{machine['system']}, Python {machine['python']}."
    )


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
