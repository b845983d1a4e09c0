"""SmolLM2 gives the unsplit model's greedy tokens in every pair of ways to run it; the product is a campaign.

Every other row of the table is left to `make test-release`.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.artifacts import artifact
from tests.campaigns.same_tokens import PAIRWISE, Answered, Setting, compare, smollm2_answers

pytestmark = [pytest.mark.real_model, pytest.mark.slow]

FEW = 4
"""Prompts where one sequence of a replica runs at a time; the campaign runs all there are."""
OPTIMUM = Setting(tp=4, pp=2, dp=1, batch=16, chunk=7, preempted=True, caching=True, workers=None)


@pytest.fixture(scope="module", autouse=True)
def folder_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Artifacts are built anew: not where another worker reads them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.artifacts.FOLDER", tmp_path_factory.mktemp("same-tokens"))
        yield


@pytest.fixture(scope="module")
def expected() -> list[Answered]:
    return smollm2_answers("genai-fp32")


@pytest.mark.parametrize(
    "setting",
    [pytest.param(one, id=str(one), marks=pytest.mark.release if row % 2 else ()) for row, one in enumerate(PAIRWISE)],
)
def test_tokens_are_the_unsplit_models(setting: Setting, expected: list[Answered]) -> None:
    found = compare(
        artifact("genai-fp32", setting.tp).folder, setting, expected[-FEW:] if setting.batch == 1 else expected
    )
    assert found.problems == []
    assert found.error < 1e-3


def test_tokens_in_the_shape_that_optimum_exports() -> None:
    found = compare(artifact("optimum-fp32", OPTIMUM.tp).folder, OPTIMUM, smollm2_answers("optimum-fp32", FEW))
    assert found.problems == []
