"""How far an artifact's outputs are from the unsplit model's, and when that is too far."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from furiosa_llm.runtime.artifact.dtypes import Array

LOGIT_MAGNITUDE = 64.0
"""The greatest magnitude that a tolerance of logits refers to: an entry of -1e9, which masks a token, must not allow an
error in other entries. So the tolerance is absolute, too: a relative 1e-4 allows at most 6.4e-3."""


OUTLIER = 20.0
"""How many times the tolerance the error of a single element may be: at a rare token a model magnifies rounding a
hundredfold (SmolLM2, random tokens: 1e-6 at half of the positions, 7e-5 at one in some thousands)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputDifference:
    """The difference between artifact and model in one output of one case, over the elements finite on both sides."""

    case: str
    output: str
    absolute: float
    """The greatest error of an element, in the output's own units."""
    relative: float
    """`absolute` over the greatest magnitude of the model's output."""
    mean: float
    """The root of the mean square of all errors, over the same magnitude."""
    finite: bool
    """Whether the elements that are not finite on both sides are equal, NaN to NaN."""

    def within(self, tolerance: float) -> bool:
        """Whether the mean error is at most `tolerance`, and no element's error more than OUTLIER times as large."""
        return self.finite and self.mean <= tolerance and self.relative <= OUTLIER * tolerance


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenComparison:
    """The greedy tokens of one prompt on both sides."""

    prompt: str
    tokens: int
    first_difference: int | None
    """The position of the first token that differs; None if no token differs."""
    gap: float | None
    """The distance between the model's two best logits at that position."""
    logit_error: float
    """The greatest difference in the logits up to that position; infinite where one side is not finite."""
    magnitude: float
    """The magnitude of the model's greatest logit, LOGIT_MAGNITUDE at most."""

    def within(self, tolerance: float) -> bool:
        """Whether the logits are as near as `tolerance` allows, and the first token that differs, if any, is a tie.

        A tie is a choice between logits that are no further apart than the tolerance. The artifact's own error does not
        widen it.
        """
        allowed = tolerance * self.magnitude
        return self.logit_error <= allowed and (self.gap is None or self.gap <= allowed)


def magnitude_of(values: Array, *, logits: bool) -> float:
    """The greatest finite magnitude; for logits, LOGIT_MAGNITUDE at most."""
    magnitudes = np.abs(_numbers(values))
    greatest = float(magnitudes.max(initial=0.0))
    if not math.isfinite(greatest):
        greatest = float(magnitudes[np.isfinite(magnitudes)].max(initial=0.0))
    return min(greatest, LOGIT_MAGNITUDE) if logits else greatest


def output_error(
    case: str, name: str, pairs: Iterable[tuple[Array, Array]], whole: Array, *, logits: bool
) -> OutputDifference:
    """The error over pairs of an actual and an expected part, where the expected parts are parts of `whole`."""
    magnitude = magnitude_of(whole, logits=logits) or 1.0
    relative, same, squares, count = 0.0, True, 0.0, 0
    for found, expected in pairs:
        ours, theirs = _numbers(found), _numbers(expected)
        with np.errstate(invalid="ignore", over="ignore"):
            errors = np.abs(ours - theirs) / magnitude
        finite = np.isfinite(errors)
        if not finite.all():
            same &= bool(np.array_equal(ours[~finite], theirs[~finite], equal_nan=True))
            errors = errors[finite]
        relative = max(relative, float(errors.max(initial=0.0)))
        squares, count = squares + float(np.square(errors).sum(dtype=np.float64)), count + errors.size
    return OutputDifference(
        case=case,
        output=name,
        absolute=relative * magnitude,
        relative=relative,
        mean=math.sqrt(squares / (count or 1)),
        finite=same,
    )


def _numbers(values: Array) -> Array:
    """The values in a type that has differences."""
    return values if values.dtype in (np.float32, np.float64) else values.astype(np.float64)
