"""SmolLM2 gives the unsplit model's greedy tokens in every pair of ways to run it; the product is a campaign.

Every other row of the table is left to `make test-release`.
"""

from __future__ import annotations

import pytest

from tests.campaigns.same_tokens import PAIRWISE, Answered, Setting, compare, smollm2_answers
from tests.support.artifacts import smollm2_artifact

pytestmark = [pytest.mark.real_model, pytest.mark.slow]

FEW, MANY, NUM_TOKENS = 2, 8, 26
"""Prompts of a replica that runs one at a time, and of one that runs many, and tokens; the campaign has more."""
OPTIMUM = Setting(tp=4, pp=2, dp=1, batch=16, chunk=7, preempted=True, caching=True, workers=None)


@pytest.fixture(scope="module")
def expected() -> list[Answered]:
    return smollm2_answers(smollm2_artifact("genai-fp32"), "genai-fp32", MANY, NUM_TOKENS)


@pytest.mark.parametrize(
    "setting",
    [pytest.param(one, id=str(one), marks=pytest.mark.release if row % 2 else ()) for row, one in enumerate(PAIRWISE)],
)
def test_tokens_are_the_unsplit_models(setting: Setting, expected: list[Answered]) -> None:
    folder = smollm2_artifact("genai-fp32", setting.tp)
    found = compare(folder, setting, expected[-FEW * setting.dp :] if setting.batch == 1 else expected)
    assert found.problems == []
    assert found.error < 1e-3


def test_tokens_in_the_shape_that_optimum_exports() -> None:
    folder = smollm2_artifact("optimum-fp32", OPTIMUM.tp)
    found = compare(folder, OPTIMUM, smollm2_answers(folder, "optimum-fp32", FEW, NUM_TOKENS))
    assert found.problems == []
