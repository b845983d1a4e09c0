"""A share of the soundness fuzz (tests/builder/fuzz_plans.py), the same plans every time."""

import pytest

from tests.builder.fuzz_plans import campaign, zoo_models

PLANS = 9
"""For each model: together about half a minute."""


@pytest.mark.parametrize("name", zoo_models())
def test_random_plans_give_the_unsplit_models_results(name: str) -> None:
    failures = [str(failure) for failure in campaign([name], PLANS) if failure is not None]
    assert failures == []
