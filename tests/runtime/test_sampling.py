"""Sampling parameters in their ranges, and tokens chosen as they say."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from furiosa_llm.runtime import SamplingParams
from furiosa_llm.runtime.artifact.errors import FuriosaLLMError
from furiosa_llm.runtime.errors import SamplingParamsError
from furiosa_llm.runtime.sampler import Sampler
from furiosa_llm.runtime.sampling_params import SamplingType

LOGITS = np.log(np.array([0.05, 0.4, 0.3, 0.15, 0.1], dtype=np.float32))


def draw(count: int = 2000, **values: Any) -> Counter[int]:
    sampler = Sampler(SamplingParams(seed=1, **values), [])
    return Counter(sampler.sample(LOGITS) for _ in range(count))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n": 0}, r"n must be at least 1, got 0\."),
        ({"n": 2}, r"furiosa-llm currently does not support n > 1, got 2\."),
        ({"best_of": 0}, r"best_of must be greater than or equal to n, got n=1 and best_of=0\."),
        ({"best_of": 2}, r"furiosa-llm currently does not support best_of > 1, got 2\."),
        ({"best_of": 2, "temperature": 0.0}, r"best_of must be 1 when using greedy sampling\. Got 2\."),
        ({"repetition_penalty": 0.0}, r"repetition_penalty must be in \(0, 2\], got 0\.0\."),
        ({"repetition_penalty": 2.5}, r"repetition_penalty must be in \(0, 2\], got 2\.5\."),
        ({"temperature": -1.0}, r"temperature must be non-negative, got -1\.0\."),
        ({"temperature": float("nan")}, r"temperature must be non-negative, got nan\."),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0\.0\."),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\], got 1\.5\."),
        ({"top_k": 0}, r"top_k must be -1 \(disable\), or at least 1, got 0\."),
        ({"min_p": 1.5}, r"min_p must be in \[0, 1\], got 1\.5\."),
        ({"max_tokens": 0}, r"max_tokens must be at least 1, got 0\."),
        ({"min_tokens": -1}, r"min_tokens must be greater than or equal to 0, got -1\."),
        ({"min_tokens": 17}, r"min_tokens must be less than or equal to max_tokens=16, got 17\."),
        ({"early_stopping": True}, "early_stopping is not effective and must be False when not using beam search"),
        ({"length_penalty": 2.0}, r"length_penalty is not effective and must be the default value of 1\.0"),
        ({"use_beam_search": True}, "furiosa-llm currently does not support beam search"),
        ({"stop": ["a", ""]}, "stop must not hold an empty string"),
        ({"seed": -1}, r"seed must be non-negative, got -1\."),
    ],
)
def test_values_out_of_range_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SamplingParamsError, match=message) as caught:
        SamplingParams(**values)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, FuriosaLLMError)


def test_from_optional_takes_none_for_the_default() -> None:
    params = SamplingParams.from_optional(temperature=None, top_k=5, max_tokens=None, stop=None)
    assert params == SamplingParams(top_k=5, max_tokens=None)
    with pytest.raises(SamplingParamsError, match="unknown sampling parameters: beams"):
        SamplingParams.from_optional(beams=3)


def test_kinds_and_stop_strings() -> None:
    assert SamplingParams().sampling_type is SamplingType.RANDOM
    assert SamplingParams(temperature=0.0).sampling_type is SamplingType.GREEDY
    assert SamplingParams(stop="x").stop_strings == ("x",)
    assert SamplingParams(stop=["x", "y"]).stop_strings == ("x", "y")


def test_greedy_takes_the_likeliest() -> None:
    assert draw(3, temperature=0.0) == {1: 3}


def test_frequencies_are_the_probabilities() -> None:
    found = draw(20_000)
    shares = np.array([found[token] for token in range(5)]) / 20_000
    np.testing.assert_allclose(shares, np.exp(LOGITS), atol=0.015)


@pytest.mark.parametrize(
    ("values", "tokens"),
    [
        ({"top_k": 1}, {1}),
        ({"top_k": 2}, {1, 2}),
        ({"top_k": 99}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.39}, {1}),
        ({"top_p": 0.6}, {1, 2}),
        ({"top_p": 0.75}, {1, 2, 3}),
        ({"min_p": 0.5}, {1, 2}),
        ({"min_p": 0.2}, {1, 2, 3, 4}),
        ({"temperature": 0.05}, {1, 2}),
    ],
)
def test_what_the_parameters_leave(values: dict[str, Any], tokens: set[int]) -> None:
    assert set(draw(**values)) == tokens


def test_a_seed_repeats_and_another_does_not() -> None:
    def sequence(params_seed: int | None, seed: int | None) -> list[int]:
        sampler = Sampler(SamplingParams(seed=params_seed), [], seed=seed)
        return [sampler.sample(LOGITS) for _ in range(50)]

    assert sequence(3, None) == sequence(3, 9)
    assert sequence(None, 9) == sequence(None, 9)
    assert sequence(3, None) != sequence(4, None)


def test_repetition_is_penalised_in_prompt_and_completion() -> None:
    logits = np.array([2.0, 1.9, -1.0], dtype=np.float32)
    params = SamplingParams(temperature=0.0, repetition_penalty=1.5)
    assert Sampler(params, []).sample(logits) == 0
    assert Sampler(params, [0]).sample(logits) == 1
    sampler = Sampler(params, [999])
    assert [sampler.sample(logits) for _ in range(2)] == [0, 1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_forbidden_tokens_are_not_chosen(temperature: float) -> None:
    sampler = Sampler(SamplingParams(temperature=temperature, seed=0), [])
    assert {sampler.sample(LOGITS, forbidden=[1, 2]) for _ in range(200)} <= {0, 3, 4}
