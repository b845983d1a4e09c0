"""What outputs look like, and the log probabilities in them."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from furiosa_llm.runtime.requests.logprobs import PromptLogprobs, logprob, logprobs
from furiosa_llm.runtime.requests.outputs import CompletionOutput, Logprob, RequestOutput
from tests.support.runtime.tokenizer_kinds import spelled

TOKENIZER = spelled("a", "b", "c")


def test_outputs_are_written_as_the_vendor_writes_them() -> None:
    plain = CompletionOutput(index=0, text="a", token_ids=[5])
    assert repr(plain) == "CompletionOutput(index=0, text='a', token_ids=[5], finish_reason=None)"
    output = RequestOutput(request_id="7", prompt=None, prompt_token_ids=[1], outputs=[plain], finished=False)
    assert repr(output) == (
        f"RequestOutput(request_id='7', prompt=None, prompt_token_ids=[1], outputs=[{plain!r}], finished=False)"
    )


def test_what_later_releases_added_is_written_if_it_is_there() -> None:
    chosen = Logprob(logprob=-0.5, rank=1, decoded_token="a")
    completion = CompletionOutput(
        index=1,
        text="a",
        token_ids=[5],
        finish_reason="stop",
        logprobs=[{5: chosen}],
        cumulative_logprob=-0.5,
        stop_reason="b",
    )
    assert repr(completion) == (
        "CompletionOutput(index=1, text='a', token_ids=[5], finish_reason='stop', logprobs=[{5: Logprob(logprob=-0.5, "
        "rank=1, decoded_token='a')}], cumulative_logprob=-0.5, stop_reason='b')"
    )
    output = RequestOutput(
        request_id="7",
        prompt="b",
        prompt_token_ids=[1],
        outputs=[],
        finished=True,
        prompt_logprobs=[None],
        num_cached_tokens=0,
    )
    assert repr(output).endswith("outputs=[], finished=True, prompt_logprobs=[None], num_cached_tokens=0)")


@given(st.lists(st.integers(-40, 40), min_size=1, max_size=50), st.integers(0, 20), st.data())
def test_log_probabilities_are_those_of_their_formula(values: list[int], count: int, data: st.DataObject) -> None:
    token = data.draw(st.integers(0, len(values) - 1))
    logits = np.array(values, dtype=np.float32) / 4
    total = math.log(math.fsum(math.exp(value / 4) for value in values))
    found = logprobs(logits, token, count, None)
    ranked = sorted(range(len(values)), key=lambda other: (-values[other], other))[:count]
    assert list(found) == [token, *(other for other in ranked if other != token)]
    for other, entry in found.items():
        assert entry.logprob == pytest.approx(values[other] / 4 - total, abs=1e-5)
        assert entry.rank == 1 + sum(value > values[other] for value in values)
        assert entry.decoded_token is None
    assert logprob(logits, token) == found[token].logprob


def test_tokens_are_written_beside_their_log_probabilities() -> None:
    beyond = TOKENIZER.vocab_size
    logits = np.zeros(beyond + 1, dtype=np.float32)
    logits[[0, 1, beyond]] = [1.0, 2.0, 3.0]
    found = logprobs(logits, 2, 3, TOKENIZER)
    assert {token: entry.decoded_token for token, entry in found.items()} == {2: "c", beyond: "", 1: "b", 0: "a"}


def test_logits_of_other_types_and_masked_ones() -> None:
    logits = np.array([1.0, -np.inf, 2.0], dtype=ml_dtypes.bfloat16)
    found = logprobs(logits, 1, 1, None)
    assert found[1].logprob == -math.inf
    assert found[2].logprob == pytest.approx(-math.log(1 + math.exp(-1)))
    lowest = np.array([1.0, np.finfo(np.float32).min, 1e38], dtype=np.float32)
    assert logprob(lowest, 2) == 0.0


@given(st.lists(st.integers(1, 4), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_log_probabilities_of_a_prompt_in_chunks(sizes: list[int], random: object) -> None:
    length = sum(sizes)
    prompt = [position % 3 for position in range(length)]
    logits = np.random.default_rng(length).standard_normal((length + 2, 5)).astype(np.float32)
    entries = PromptLogprobs(prompt, 2, None)
    start = 0
    for size in sizes:
        assert entries.complete == (start >= length - 1)
        entries.accept(start, logits[start : start + size].copy())
        # What comes again, with other numbers, is what was computed before.
        entries.accept(max(0, start - 1), np.zeros((1, 5), dtype=np.float32))
        start += size
    entries.accept(length, logits[length:])
    assert entries.complete
    assert entries.entries[0] is None
    for position in range(1, length):
        assert entries.entries[position] == logprobs(logits[position - 1], prompt[position], 2, None)
