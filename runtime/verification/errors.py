"""How far what an artifact gives is from what the unsplit model gives, and when that is too far."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from furiosa_llm.runtime.artifact.dtypes import Array

LOGIT_MAGNITUDE = 64.0
"""The magnitude that a tolerance of logits refers to, at most: an entry of -1e9, which masks a token, allows no error
of others. So the tolerance is absolute, too: 6.4e-3 where 1e-4 is relative."""


OUTLIER = 20.0
"""How many times a tolerance the error of a single element may be: at a rare token a model magnifies rounding a
hundredfold (SmolLM2, random tokens: 1e-6 at half of the positions, 7e-5 at one in some thousands)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputDifference:
    """The difference between artifact and model in one output of one case.

    `absolute` is the greatest of all elements, in the output's own units; `relative` is `absolute` over the greatest
    magnitude of the model's output, and `mean` the root of the mean square of all errors over that magnitude. All are
    of the elements that are finite on both sides; `finite` says that the others are equal, NaN to NaN.
    """

    case: str
    output: str
    absolute: float
    relative: float
    mean: float
    finite: bool

    def within(self, tolerance: float) -> bool:
        """Whether the mean error is at most `tolerance`, and no element's more than OUTLIER times that."""
        return self.finite and self.mean <= tolerance and self.relative <= OUTLIER * tolerance


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenComparison:
    """The greedy tokens of one prompt on both sides.

    `first_difference` is the position of the first token that differs, None if none does; `gap` is the distance between
    the model's two best logits there, `logit_error` the greatest difference in the logits up to there (infinite where
    one side is not finite), and `magnitude` the model's greatest logit, LOGIT_MAGNITUDE at most.
    """

    prompt: str
    tokens: int
    first_difference: int | None
    gap: float | None
    logit_error: float
    magnitude: float

    def within(self, tolerance: float) -> bool:
        """Whether the logits are as near as `tolerance` allows, and the first token that differs, if any, is a tie.

        A tie is a choice between logits that are no further apart than that, either. How wrong the artifact itself is
        excuses nothing.
        """
        allowed = tolerance * self.magnitude
        return self.logit_error <= allowed and (self.gap is None or self.gap <= allowed)


def magnitude_of(values: Array, *, logits: bool) -> float:
    """The greatest finite magnitude, of logits LOGIT_MAGNITUDE at most."""
    magnitudes = np.abs(_numbers(values))
    greatest = float(magnitudes.max(initial=0.0))
    if not math.isfinite(greatest):
        greatest = float(magnitudes[np.isfinite(magnitudes)].max(initial=0.0))
    return min(greatest, LOGIT_MAGNITUDE) if logits else greatest


def output_error(
    case: str, name: str, pairs: Iterable[tuple[Array, Array]], whole: Array, *, logits: bool
) -> OutputDifference:
    """The error of pairs of what was found and what was expected, which is a part of `whole`."""
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
    """What differences can be taken of."""
    return values if values.dtype in (np.float32, np.float64) else values.astype(np.float64)
