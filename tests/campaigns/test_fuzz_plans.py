"""A share of the soundness fuzz (tests/campaigns/fuzz_plans.py), the same plans every time."""

import pytest

from tests.campaigns.fuzz_plans import campaign, zoo_models

FAST = (
    *("tiny-llama-9-3-optimum/model.onnx", "tiny-phi3-optimum/model.onnx"),
    *("tiny-llama-genai-int4/model.onnx", "tiny-t5-optimum/decoder_with_past_model.onnx"),
)
"""Models of which `make test` tries a few plans; `make test-all` tries more, of every model."""


def failures(name: str, plans: int) -> list[str]:
    return [str(failure) for failure in campaign([name], plans) if failure is not None]


@pytest.mark.parametrize("name", FAST)
def test_a_few_random_plans_give_the_unsplit_models_results(name: str) -> None:
    assert failures(name, 2) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo_models())
def test_random_plans_give_the_unsplit_models_results(name: str) -> None:
    assert failures(name, 9) == []
