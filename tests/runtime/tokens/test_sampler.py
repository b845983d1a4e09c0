"""Tokens chosen as the sampling parameters say: each step against a slow formula, and the same whatever the batch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from furiosa_llm.runtime import SamplingParams
from furiosa_llm.runtime.errors import ExecutionError, SamplingParamsError
from furiosa_llm.runtime.tokens.sampler import Sampler, derived_seed, sample_rows
from furiosa_llm.runtime.tokens.top_tokens import choose, likeliest, nucleus

Floats = npt.NDArray[np.float32]
LOGITS = np.log(np.array([0.05, 0.4, 0.3, 0.15, 0.1], dtype=np.float32))
VOCABULARY = 5000


def draw(count: int = 2000, logits: Floats = LOGITS, **values: Any) -> Counter[int]:
    return Counter(Sampler(SamplingParams(seed=seed, **values), []).sample(logits) for seed in range(count))


def rows(count: int, size: int = VOCABULARY, seed: int = 0) -> Floats:
    return (np.random.default_rng(seed).standard_normal((count, size)) * 3).astype(np.float32)


def expected(
    logits: Sequence[float], prompt: Sequence[int], output: Sequence[int], *, stops: Sequence[int] = (), **values: Any
) -> list[float]:
    """The probability of each token, one by one in the order of docs/sampling.md; a greedy choice has 1."""
    params = SamplingParams(**values)
    scores = [float(logit) for logit in logits]
    for token in range(len(scores)):
        if params.allowed_token_ids is not None and token not in params.allowed_token_ids:
            scores[token] = -math.inf
        if len(output) < params.min_tokens and token in stops:
            scores[token] = -math.inf
        scores[token] += params.logit_bias.get(token, 0.0)
        if token in prompt or token in output:
            penalty = params.repetition_penalty
            scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
        scores[token] -= params.frequency_penalty * output.count(token)
        scores[token] -= params.presence_penalty * (token in output)
    if params.temperature < 1e-5:
        return [float(token == scores.index(max(scores))) for token in range(len(scores))]
    weights = [math.exp((score - max(scores)) / params.temperature) for score in scores]
    weights = [weight if weight >= params.min_p else 0.0 for weight in weights]
    ranked = sorted(range(len(weights)), key=lambda token: (-weights[token], token))
    if params.top_k > 0:
        weights = [weight if token in ranked[: params.top_k] else 0.0 for token, weight in enumerate(weights)]
    kept, mass = set(), 0.0
    for token in ranked:
        if mass < params.top_p * sum(weights) or params.top_p == 1.0:
            kept.add(token)
        mass += weights[token]
    weights = [weight if token in kept else 0.0 for token, weight in enumerate(weights)]
    return [weight / sum(weights) for weight in weights]


PARAMETERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"temperature": 0.0},
    {"top_k": 3},
    {"top_k": 99},
    {"top_p": 0.7},
    {"top_p": 1e-6},
    {"min_p": 0.3},
    {"min_p": 1.0},
    {"temperature": 2.0, "min_p": 0.3},
    {"temperature": 2.0, "min_p": 0.2, "top_k": 4, "top_p": 0.8},
    {"top_k": 4, "top_p": 0.8},
    {"min_p": 0.1, "top_p": 0.8},
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.4},
    {"presence_penalty": 1.5},
    {"presence_penalty": -1.5},
    {"frequency_penalty": 0.8},
    {"frequency_penalty": -0.8},
    {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": -0.4, "temperature": 0.7, "top_p": 0.9},
    {"repetition_penalty": 2.0, "temperature": 0.0},
    {"logit_bias": {0: 3.0, 6: -100.0, 3: 0.5}},
    {"logit_bias": {1: -100.0}, "temperature": 0.0},
    {"logit_bias": {1: 2.0}, "repetition_penalty": 1.6},
    {"allowed_token_ids": [0, 2, 5]},
    {"allowed_token_ids": [2, 5, 4], "logit_bias": {0: 50.0, 5: 1.0}, "top_k": 2},
    {"min_tokens": 9, "logit_bias": {2: 5.0}},
    {"min_tokens": 3},
]
STEP = [1.2, 0.4, -0.3, 2.0, -1.5, 0.9, 1.7, -0.8]
PROMPT, OUTPUT, STOPS = [3, 4, 4], [5, 2, 5], [0, 6]


def after_output(seed: int, values: dict[str, Any]) -> Sampler:
    sampler = Sampler(SamplingParams(max_tokens=20, seed=seed, **values), PROMPT, stop_token_ids=STOPS)
    for token in OUTPUT:
        sampler.record(token)
    return sampler


@pytest.mark.parametrize("values", PARAMETERS, ids=str)
def test_each_step_is_what_its_formula_says(values: dict[str, Any]) -> None:
    probabilities = np.array(expected(STEP, PROMPT, OUTPUT, stops=STOPS, max_tokens=20, **values))
    logits = np.array(STEP, dtype=np.float32)
    count = 1000
    found = np.bincount([after_output(seed, values).sample(logits) for seed in range(count)], minlength=len(STEP))
    likely = probabilities > 0
    assert not found[~likely].any()
    chi_square = (((found - count * probabilities) ** 2)[likely] / (count * probabilities[likely])).sum()
    freedom = likely.sum() - 1
    # Five standard deviations above its mean; the seeds are fixed, so that the figure is too.
    assert chi_square <= freedom + 5 * math.sqrt(2 * freedom)


def test_draws_of_one_sampler_have_the_frequencies_of_the_probabilities() -> None:
    logits = np.tile(LOGITS, 400) - math.log(400)
    sampler = Sampler(SamplingParams(seed=1), [])
    count = 20_000
    found = np.bincount([sampler.sample(logits) for _ in range(count)], minlength=logits.size)
    by_kind = found.reshape(400, 5).sum(axis=0)
    means = count * np.exp(LOGITS.astype(np.float64))
    assert ((by_kind - means) ** 2 / means).sum() < 4 + 5 * math.sqrt(8)
    mean = count / 400
    assert abs(((found.reshape(400, 5).sum(axis=1) - mean) ** 2 / mean).sum() - 399) < 5 * math.sqrt(2 * 399)


@pytest.mark.parametrize(
    ("values", "tokens"),
    [
        ({"temperature": 0.0}, {1}),
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


@given(
    st.lists(st.integers(-4, 4), min_size=2, max_size=400), st.integers(1, 2500), st.sampled_from([1, 7, 20]), st.data()
)
def test_the_likeliest(values: list[int], count: int, repeats: int, data: st.DataObject) -> None:
    scores = np.array(values * repeats, dtype=np.float32)
    count = min(count, scores.size)
    least = np.sort(scores)[::-1][count - 1]
    assert likeliest(scores, count).tolist() == np.flatnonzero(scores >= least).tolist()


@given(st.integers(0, 10**6), st.sampled_from([3, 100, 3000]), st.floats(0.05, 30), st.floats(1e-3, 1.0))
def test_the_nucleus(seed: int, size: int, spread: float, share: float) -> None:
    random = np.random.default_rng(seed)
    # Rounded, so that some weights are equal.
    scores = np.round(random.standard_normal(size) * spread, 1)
    weights = np.exp(scores - scores.max()).astype(np.float32)
    ranked = np.argsort(-weights, kind="stable")
    reached = np.cumsum(weights[ranked], dtype=np.float64)
    count = int(np.searchsorted(reached, share * float(weights.sum()))) + 1
    assert nucleus(weights, share).tolist() == sorted(ranked[:count].tolist())


@given(st.lists(st.sampled_from([0.0, 0.0, 1.0, 2.0]), min_size=1, max_size=1200), st.floats(0, 1, exclude_max=True))
def test_a_fraction_chooses_where_the_sum_passes_it(values: list[float], fraction: float) -> None:
    weights = np.array([*values, 1.0, 0.0], dtype=np.float32)
    position = choose(weights, fraction)
    target = fraction * weights.sum(dtype=np.float64)
    assert weights[position] > 0
    assert weights[:position].sum(dtype=np.float64) <= target < weights[: position + 1].sum(dtype=np.float64)


@pytest.mark.parametrize("size", [3, 700, 5000])
def test_the_greatest_fraction_chooses_the_last_that_has_weight(size: int) -> None:
    weights = np.zeros(size, dtype=np.float32)
    weights[: size // 2] = np.random.default_rng(0).random(size // 2)
    assert choose(weights, np.nextafter(1.0, 0.0)) == size // 2 - 1


MIXED: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"top_k": 50, "top_p": 0.95},
    {"top_p": 0.9},
    {},
    {"min_p": 0.1, "repetition_penalty": 1.2},
    {"temperature": 0.0, "presence_penalty": 1.0},
]


@pytest.mark.parametrize("values", [*MIXED, None], ids=str)
def test_a_row_is_the_same_in_every_batch(values: dict[str, Any] | None) -> None:
    def samplers() -> list[Sampler]:
        chosen = [values or MIXED[row % len(MIXED)] for row in range(12)]
        return [Sampler(SamplingParams(seed=row, **kind), [1, 2, row]) for row, kind in enumerate(chosen)]

    steps = [rows(12, 4999, seed=step) for step in range(4)]
    together, alone, apart = samplers(), samplers(), samplers()
    for logits in steps:
        tokens = sample_rows(together, logits)
        assert [sampler.sample(row.copy()) for sampler, row in zip(alone, logits, strict=True)] == tokens
        # In halves, at another place in memory, in the other order.
        for half in (range(5, -1, -1), range(11, 5, -1)):
            room = np.empty(6 * 4999 + 3, dtype=np.float32)[3:].reshape(6, 4999)
            room[:] = logits[list(half)]
            assert sample_rows([apart[row] for row in half], room) == [tokens[row] for row in half]


def test_logits_are_left_as_they_are() -> None:
    logits = rows(12)
    before = logits.copy()
    sample_rows([Sampler(SamplingParams(seed=0, **MIXED[row % len(MIXED)]), [1]) for row in range(12)], logits)
    np.testing.assert_array_equal(logits, before)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_types_of_logits(dtype: Any) -> None:
    logits = rows(3).astype(dtype)
    for values in MIXED:
        found = sample_rows([Sampler(SamplingParams(seed=row, **values), [1]) for row in range(3)], logits)
        alike = [Sampler(SamplingParams(seed=row, **values), [1]) for row in range(3)]
        assert found == sample_rows(alike, logits.astype(np.float32))


def sequence(count: int = 30, *, seed: int | None = None, index: int = 0, **values: Any) -> list[int]:
    sampler = Sampler(SamplingParams(**values), [], seed=seed, index=index)
    return [sampler.sample(LOGITS) for _ in range(count)]


def test_a_seed_repeats_and_another_does_not() -> None:
    assert sequence(seed=None) != sequence(seed=None)
    first = sequence(seed=9)
    assert first == sequence(seed=9)
    assert first != sequence(seed=8)
    assert sequence(seed=9, index=1) != first
    assert sequence(seed=9, index=1) == sequence(seed=9, index=1)
    mine = Sampler(SamplingParams(seed=3), [], seed=1)
    same = Sampler(SamplingParams(seed=3), [], seed=2)
    assert [mine.sample(LOGITS) for _ in range(30)] == [same.sample(LOGITS) for _ in range(30)]


def test_the_derivation_of_seeds_is_the_documented_one() -> None:
    random = np.random.default_rng(np.random.SeedSequence(7, spawn_key=(2,)))
    bounds = np.cumsum(np.exp(LOGITS - LOGITS.max()), dtype=np.float64)
    by_hand = [int(np.searchsorted(bounds, random.random() * bounds[-1], side="right")) for _ in range(30)]
    assert sequence(seed=7, index=2) == by_hand


def test_seeds_of_requests_differ() -> None:
    seeds = {derived_seed(seed, number) for seed in (0, 1, 2**63) for number in range(50)}
    assert len(seeds) == 150
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert derived_seed(5, 3) == derived_seed(5, 3)


def test_repetition_counts_from_the_prompt_on() -> None:
    logits = np.array([2.0, 1.9, -1.0], dtype=np.float32)
    params = SamplingParams(temperature=0.0, repetition_penalty=1.5)
    assert Sampler(params, []).sample(logits) == 0
    assert Sampler(params, [0]).sample(logits) == 1
    sampler = Sampler(params, [999])
    assert [sampler.sample(logits) for _ in range(2)] == [0, 1]


def test_frequencies_count_many_tokens() -> None:
    # More kinds of tokens than the counts have room for at first, each as often as its number's last digit.
    logits = np.zeros(300, dtype=np.float32)
    sampler = Sampler(SamplingParams(temperature=0.0, frequency_penalty=0.5), range(100, 400))
    for token in range(300):
        for _ in range(token % 10 + (token > 9)):
            sampler.record(token)
    assert sampler.sample(logits) == 0
    assert [sampler.sample(logits) for _ in range(4)] == [0, 1, 10, 20]


def test_stop_tokens_wait_for_the_least_number_of_tokens() -> None:
    sampler = Sampler(SamplingParams(temperature=0.0, min_tokens=2), [], stop_token_ids={1, 2, 900})
    assert [sampler.sample(LOGITS) for _ in range(4)] == [3, 3, 1, 1]


def test_bad_words_are_not_completed() -> None:
    params = SamplingParams(temperature=0.0, repetition_penalty=1.0)
    assert Sampler(params, [], bad_words=[(1,), (900,)]).sample(LOGITS) == 2
    sampler = Sampler(params, [1], bad_words=[(1, 1), (1, 2, 2), (2, 1)])
    # 1 may begin a word, but neither follow itself nor 2; a second 2 would complete the second word.
    assert [sampler.sample(LOGITS) for _ in range(5)] == [1, 2, 3, 1, 2]


def test_what_leaves_no_token() -> None:
    sampler = Sampler(SamplingParams(allowed_token_ids=[1, 2]), [], bad_words=[(1,), (2,)], name="seven")
    with pytest.raises(SamplingParamsError, match=r"request 'seven': allowed_token_ids, bad_words .* leave no token"):
        sampler.sample(LOGITS)


@pytest.mark.parametrize("values", MIXED, ids=str)
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf], ids=["nan", "-nan", "inf"])
def test_logits_that_are_not_finite(values: dict[str, Any], value: float) -> None:
    logits = rows(3)
    logits[1, 4321] = value
    samplers = [Sampler(SamplingParams(seed=0, **values), [1], name=f"request-{row}") for row in range(3)]
    with pytest.raises(
        ExecutionError, match=r"request 'request-1': the logits are not finite: the greatest is (nan|inf)"
    ):
        sample_rows(samplers, logits)


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_a_row_that_cannot_be_sampled_leaves_the_others_as_they_were(bad: int) -> None:
    """Whoever samples the others again gets what they would have got without it."""
    params = SamplingParams(temperature=30.0, seed=3, presence_penalty=1.0, min_tokens=1)
    logits = rows(3)
    expected = [Sampler(params, [1], index=row).sample(logits[row]) for row in range(3)]
    samplers = [Sampler(params, [1], index=row) for row in range(3)]
    spoiled = logits.copy()
    spoiled[bad, 5] = np.nan
    with pytest.raises(ExecutionError):
        sample_rows(samplers, spoiled)
    assert sample_rows(samplers, logits) == expected


@pytest.mark.parametrize("values", MIXED, ids=str)
def test_logits_that_are_all_masked(values: dict[str, Any]) -> None:
    with pytest.raises(ExecutionError, match=r"the logits are not finite: the greatest is -inf"):
        Sampler(SamplingParams(seed=0, **values), [1]).sample(np.full(9, -np.inf, dtype=np.float32))


@pytest.mark.parametrize("values", MIXED, ids=str)
def test_masks_as_low_as_the_type_goes(values: dict[str, Any]) -> None:
    for mask in (-np.inf, np.finfo(np.float32).min):
        logits = np.full(3000, mask, dtype=np.float32)
        logits[[7, 2999]] = [100.0, 100.5]
        sampler = Sampler(SamplingParams(seed=0, **(values | {"temperature": values.get("temperature", 0.1)})), [1])
        assert {sampler.sample(logits) for _ in range(100)} <= {7, 2999}


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0.0, "repetition_penalty": 5e-324},
        {"temperature": 1.0, "repetition_penalty": 5e-324},
        {"temperature": 1e308},
        {"temperature": 1e308, "min_p": 5e-324, "top_p": 5e-324},
        {"temperature": 1e308, "allowed_token_ids": [1, 2]},
    ],
)
def test_values_at_the_end_of_their_range_still_choose(values: dict[str, Any]) -> None:
    """All that `SamplingParams` takes gives a token; next to nothing or very hot, it could overflow."""
    sampler = Sampler(SamplingParams(seed=1, **values), [0, 1, 3])
    logits = rows(1)[0]
    logits[:4] = [5.0, -3.0, 0.0, 0.0]
    token = sampler.sample(logits)
    if "repetition_penalty" in values:
        assert token == 0  # seen, and of a positive score
    elif "allowed_token_ids" in values:
        assert token in (1, 2)
    else:
        assert 0 <= token < VOCABULARY
