"""How far outputs, and tokens, may be apart."""

from __future__ import annotations

import math

import numpy as np
import pytest

from furiosa_llm.runtime.verification.errors import LOGIT_MAGNITUDE, OUTLIER, TokenComparison, output_error

TOLERANCE = 1e-4


def compared(*, gap: float | None, error: float, magnitude: float = 10.0) -> TokenComparison:
    first = None if gap is None else 3
    return TokenComparison(
        prompt="p", tokens=3, first_difference=first, gap=gap, logit_error=error, magnitude=magnitude
    )


@pytest.mark.parametrize(
    ("gap", "error", "fine"),
    [
        (None, 1e-5, True),
        (None, 1e-2, False),  # equal tokens of other logits, twice as large for instance
        (1e-5, 1e-5, True),
        (1e-3, 1e-3, True),
        (1e-2, 1e-5, False),
        (1e-5, 1e-2, False),
        (1e-2, 5.0, False),  # an error that would excuse any gap
        (None, math.inf, False),
        (None, math.nan, False),
    ],
)
def test_a_tie_needs_both_the_gap_and_the_error_within_the_tolerance(
    gap: float | None, error: float, fine: bool
) -> None:
    assert compared(gap=gap, error=error).within(TOLERANCE) is fine


def test_a_masked_logit_excuses_no_error_of_others() -> None:
    masked = np.array([1.0, 2.0, -1e9])
    wrong = np.array([2.0, 1.0, -1e9])
    assert not output_error("c", "logits", [(wrong, masked)], masked, logits=True).within(TOLERANCE)
    assert output_error("c", "state", [(wrong, masked)], masked, logits=False).within(TOLERANCE)
    assert output_error("c", "logits", [(masked + 1e-3, masked)], masked, logits=True).relative == pytest.approx(
        1e-3 / LOGIT_MAGNITUDE, rel=1e-3
    )


def test_a_rare_element_may_be_off_by_more_than_the_rest() -> None:
    whole = np.ones(10_000)
    one, all_of_them, far = whole.copy(), whole * (1 + 2 * TOLERANCE), whole.copy()
    one[5] += TOLERANCE * OUTLIER / 2
    far[5] += TOLERANCE * OUTLIER * 2
    found = [output_error("c", "o", [(part, whole)], whole, logits=False) for part in (one, all_of_them, far)]
    assert [error.within(TOLERANCE) for error in found] == [True, False, False]
    assert found[0].mean == pytest.approx(found[0].relative / 100)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_on_one_side_is_no_match(value: float) -> None:
    whole, broken = np.ones(4), np.array([1, value, 1, 1])
    assert not output_error("c", "o", [(broken, whole)], whole, logits=False).within(1e9)
    assert not output_error("c", "o", [(whole, broken)], broken, logits=False).within(1e9)
    assert output_error("c", "o", [(broken, broken)], broken, logits=False).within(0)
