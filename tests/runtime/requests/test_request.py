"""Requests between tokens and outputs: ends, streams, several completions, log probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from furiosa_llm.runtime import RequestOutput, RequestOutputKind, SamplingParams
from furiosa_llm.runtime.errors import SamplingParamsError
from furiosa_llm.runtime.requests.logprobs import logprob, logprobs
from furiosa_llm.runtime.requests.request import Request, SequenceRequest
from furiosa_llm.runtime.tokens.tokenizer import Tokenizer
from tests.support.runtime.tokenizer_kinds import KINDS, spelled

TOKENIZER = spelled("a", "b", "c", "d", "ab")
A, B, C, D, AB = range(5)
TOOL, START, EOS, EXTRA = range(6, 10)
"""The added tokens: one that is text, and special ones."""
VOCABULARY = 10


def request(
    *, prompt: Sequence[int] = (A,), max_tokens: int = 16, tokenizer: Tokenizer | None = TOKENIZER, **values: Any
) -> Request:
    params = SamplingParams(max_tokens=max_tokens, **values)
    return Request(
        request_id="seven",
        prompt="a",
        prompt_token_ids=prompt,
        params=params,
        tokenizer=tokenizer,
        eos_token_ids=frozenset({EOS}),
        max_tokens=max_tokens,
        sequence_ids=[10 + index for index in range(params.num_sequences)],
        seed=1,
    )


def feed(sequence: SequenceRequest, tokens: Sequence[int], logits: Any = None) -> int:
    """Accepts `tokens` up to the end of the completion, and says how many."""
    for count, token in enumerate(tokens, 1):
        sequence.accept(token, logits)
        if sequence.finished:
            return count
    return len(tokens)


def last(found: Request) -> RequestOutput:
    output = found.output()
    assert output is not None
    return output


@pytest.mark.parametrize(
    ("values", "tokens", "text", "reason", "stop"),
    [
        ({}, [A, B, EOS], "ab", "stop", None),
        ({}, [EOS], "", "stop", None),
        ({"max_tokens": 3}, [A, B, C], "abc", "length", None),
        ({"max_tokens": 3}, [A, B, EOS], "ab", "stop", None),
        ({"ignore_eos": True, "max_tokens": 3}, [A, EOS, B], "ab", "length", None),
        ({"stop_token_ids": [B]}, [A, B], "a", "stop", B),
        ({"stop_token_ids": [EOS]}, [A, EOS], "a", "stop", None),
        ({"stop_token_ids": [EOS], "ignore_eos": True}, [A, EOS], "a", "stop", EOS),
        ({"stop_token_ids": [B], "include_stop_str_in_output": True}, [A, B], "ab", "stop", B),
        ({"stop_token_ids": [B], "min_tokens": 2}, [B, B, B], "bb", "stop", B),
        ({"stop": "bc"}, [AB, C], "a", "stop", "bc"),
        ({"stop": ["d", "bc"], "include_stop_str_in_output": True}, [AB, C], "abc", "stop", "bc"),
        ({"stop": "bc", "max_tokens": 3}, [A, A, B], "aab", "length", None),
        ({"stop": "c", "max_tokens": 2}, [A, C], "a", "stop", "c"),
        ({"stop": "a", "min_tokens": 2}, [A, B, A], "ab", "stop", "a"),
        ({"stop": "bc", "stop_token_ids": [D]}, [A, B, D], "ab", "stop", D),
        ({"skip_special_tokens": False}, [A, START, EOS], "a<s>", "stop", None),
        ({"skip_special_tokens": False, "include_stop_str_in_output": True}, [A, EOS], "a</s>", "stop", None),
        ({"skip_special_tokens": True}, [A, START, TOOL, EOS], "a<tool>", "stop", None),
        ({"detokenize": False}, [A, B, EOS], "", "stop", None),
    ],
)
def test_how_completions_end(values: dict[str, Any], tokens: list[int], text: str, reason: str, stop: Any) -> None:
    found = request(**values)
    assert feed(found.sequences[0], [*tokens, A, A, A]) == len(tokens)
    output = last(found)
    assert output.finished
    assert found.finished
    completion = output.outputs[0]
    assert (completion.text, completion.token_ids) == (text, tokens)
    assert (completion.finish_reason, completion.stop_reason) == (reason, stop)


def test_a_stop_string_in_text_that_is_held_back_to_the_end() -> None:
    for end in ([], [EOS]):
        found = request(
            tokenizer=KINDS["byte_fallback"], stop="é", max_tokens=3 + len(end), stop_token_ids=[300], ignore_eos=True
        )
        sequence = found.sequences[0]
        feed(sequence, [5, *(11 + byte for byte in "é".encode()), *(300 for _ in end)])
        assert (sequence.finish_reason, sequence.stop_reason) == ("stop", "é")
        assert last(found).outputs[0].text == "a"


def test_the_request_is_told_in_every_output() -> None:
    found = request(prompt=[A, B])
    found.num_cached_tokens = 1
    assert found.output() is None
    feed(found.sequences[0], [A])
    output = last(found)
    assert (output.request_id, output.prompt, output.prompt_token_ids) == ("seven", "a", [A, B])
    assert (output.num_cached_tokens, output.finished, output.prompt_logprobs) == (1, False, None)
    completion = output.outputs[0]
    assert (completion.index, completion.logprobs, completion.cumulative_logprob) == (0, None, None)
    assert found.output() is None
    assert [sequence.sequence_id for sequence in request(n=3).sequences] == [10, 11, 12]


def test_outputs_do_not_change_when_tokens_follow() -> None:
    found = request()
    feed(found.sequences[0], [A])
    first = last(found)
    feed(found.sequences[0], [B, EOS])
    assert (first.outputs[0].token_ids, first.outputs[0].text) == ([A], "a")
    assert last(found).outputs[0].token_ids == [A, B, EOS]
    assert found.output() is None


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20)
@given(data=st.data())
def test_pieces_add_up_to_the_whole(kind: str, data: st.DataObject) -> None:
    tokenizer = KINDS[kind]
    count = data.draw(st.integers(1, 3))
    tokens = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), min_size=1, max_size=24))
    values: dict[str, Any] = {
        "n": count,
        "logprobs": 1,
        "prompt_logprobs": 0,
        "stop": data.draw(st.lists(st.sampled_from(["a", "b a", "é", "ab"]), max_size=2)),
        "min_tokens": data.draw(st.integers(0, 3)),
        "include_stop_str_in_output": data.draw(st.booleans()),
    }
    order = data.draw(st.lists(st.integers(0, count - 1), min_size=30, max_size=60))
    logits = np.random.default_rng(0).standard_normal(tokenizer.vocab_size).astype(np.float32)
    told: dict[RequestOutputKind, list[RequestOutput]] = {}
    for output_kind in RequestOutputKind:
        found = request(prompt=[0, 1], tokenizer=tokenizer, output_kind=output_kind, max_tokens=20, **values)
        found.sequences[0].accept_prompt_logits(0, logits[None])
        outputs = told[output_kind] = []
        waiting = [list(tokens) for _ in found.sequences]
        for index in order:
            sequence = found.sequences[index]
            if waiting[index] and not sequence.finished:
                sequence.accept(waiting[index].pop(0), logits)
            outputs += filter(None, [found.output()])
        found.abort()
        outputs += filter(None, [found.output()])
        assert outputs[-1].finished
        assert not any(output.finished for output in outputs[:-1])
        assert found.output() is None
    (final,) = told[RequestOutputKind.FINAL]
    assert told[RequestOutputKind.CUMULATIVE][-1] == final
    assert [completion.index for completion in final.outputs] == list(range(count))
    deltas = told[RequestOutputKind.DELTA]
    assert [output.prompt_logprobs for output in deltas] == [final.prompt_logprobs, *[None] * (len(deltas) - 1)]
    for whole in final.outputs:
        pieces = [piece for output in deltas for piece in output.outputs if piece.index == whole.index]
        assert "".join(piece.text for piece in pieces) == whole.text
        assert [token for piece in pieces for token in piece.token_ids] == whole.token_ids
        assert [entry for piece in pieces for entry in piece.logprobs or []] == whole.logprobs
        assert pieces[-1].cumulative_logprob == whole.cumulative_logprob
        assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
        assert pieces[-1].finish_reason == whole.finish_reason
        assert all(piece.token_ids or piece.finish_reason for piece in pieces)
        if whole.finish_reason == "abort":
            assert whole.text == tokenizer.decode(whole.token_ids)


def test_an_aborted_request_ends_what_is_under_way() -> None:
    found = request(n=2)
    feed(found.sequences[0], [A, EOS])
    feed(found.sequences[1], [B])
    found.abort()
    output = last(found)
    assert output.finished
    assert [completion.finish_reason for completion in output.outputs] == ["stop", "abort"]
    assert [completion.text for completion in output.outputs] == ["a", "b"]


def test_a_request_aborted_before_its_first_token() -> None:
    found = request(output_kind=RequestOutputKind.DELTA)
    found.abort()
    output = last(found)
    assert (output.finished, output.outputs[0].finish_reason, output.outputs[0].token_ids) == (True, "abort", [])
    found.abort()
    assert found.output() is None


LOGITS = np.log(np.array([0.4, 0.3, 0.1, 0.1, 0.02, 0.02, 0.02, 0.02, 0.02], dtype=np.float32))


@pytest.mark.parametrize("kind", RequestOutputKind)
@pytest.mark.parametrize("with_logprobs", [True, False])
def test_the_likeliest_of_several_completions(kind: RequestOutputKind, with_logprobs: bool) -> None:
    found = request(n=2, best_of=4, output_kind=kind, logprobs=0 if with_logprobs else None)
    for sequence, tokens in zip(found.sequences, ([C, C, EOS], [A, B, EOS], [A, A, EOS], [B, A, EOS]), strict=True):
        assert found.output() is None
        feed(sequence, tokens, LOGITS)
    output = last(found)
    assert output.finished
    assert [(completion.index, completion.text) for completion in output.outputs] == [(0, "aa"), (1, "ab")]
    expected = [sum(logprob(LOGITS, token) for token in tokens) for tokens in ([A, A, EOS], [A, B, EOS])]
    assert [completion.cumulative_logprob for completion in output.outputs] == pytest.approx(expected)
    assert [completion.logprobs is not None for completion in output.outputs] == [with_logprobs] * 2
    assert found.output() is None


def test_log_probabilities_of_a_completion() -> None:
    found = request(logprobs=2)
    rows = np.random.default_rng(0).standard_normal((3, VOCABULARY)).astype(np.float32)
    memory = np.empty(VOCABULARY, dtype=np.float32)
    for token, row in zip([A, START, EOS], rows, strict=True):
        memory[:] = row  # as a runner's next batch overwrites the last one's logits
        found.sequences[0].accept(token, memory)
    completion = last(found).outputs[0]
    expected = [logprobs(row, token, 2, TOKENIZER) for token, row in zip([A, START, EOS], rows, strict=True)]
    assert completion.logprobs == expected
    assert completion.cumulative_logprob == pytest.approx(
        sum(entry[token].logprob for entry, token in zip(expected, [A, START, EOS], strict=True))
    )
    assert expected[1][START].decoded_token == "<s>"


def test_log_probabilities_of_a_prompt_are_wanted_once() -> None:
    rows = np.random.default_rng(0).standard_normal((3, VOCABULARY)).astype(np.float32)
    found = request(prompt=[A, B, C], prompt_logprobs=1, n=2)
    first, second = found.sequences
    assert (first.wants_prompt_logits, second.wants_prompt_logits) == (True, False)
    first.accept_prompt_logits(0, rows[:1])
    wanted = [first.wants_prompt_logits]
    first.accept_prompt_logits(1, rows[1:])
    assert [*wanted, first.wants_prompt_logits] == [True, False]
    second.accept_prompt_logits(0, rows)
    first.accept(A, rows[2])
    expected = [None, logprobs(rows[0], B, 1, TOKENIZER), logprobs(rows[1], C, 1, TOKENIZER)]
    assert last(found).prompt_logprobs == expected
    assert not request(prompt=[A], prompt_logprobs=1).sequences[0].wants_prompt_logits
    assert not request(prompt=[A, B]).sequences[0].wants_prompt_logits


def test_completions_draw_their_own_random_numbers() -> None:
    def draws(found: Request) -> list[list[int]]:
        return [[sequence.sampler.sample(LOGITS) for _ in range(20)] for sequence in found.sequences]

    first, second = draws(request(n=2))
    assert first != second
    assert draws(request(n=2)) == [first, second]
    assert draws(request(n=1)) == [first]
    assert draws(request(n=1, seed=5)) != [first]


def test_samplers_know_what_the_request_forbids() -> None:
    likely_end = np.zeros(VOCABULARY, dtype=np.float32)
    likely_end[[EOS, D, A, B]] = [9.0, 8.0, 7.0, 6.0]
    sampler = request(temperature=0.0, min_tokens=1, stop_token_ids=[D], bad_words=["a"]).sequences[0].sampler
    assert [sampler.sample(likely_end) for _ in range(2)] == [B, EOS]
    ignoring = request(temperature=0.0, min_tokens=1, ignore_eos=True).sequences[0].sampler
    assert ignoring.sample(likely_end) == EOS


def test_bad_words_of_several_tokens() -> None:
    (sequence,) = request(temperature=0.0, bad_words=["xy"], tokenizer=KINDS["byte_level"]).sequences
    x, y, z = (ord(letter) for letter in "xyz")

    def likeliest(*tokens: int) -> int:
        row = np.zeros(300, dtype=np.float32)
        row[list(tokens)] = range(len(tokens), 0, -1)
        return sequence.sampler.sample(row)

    assert [likeliest(x), likeliest(y, z), likeliest(y), likeliest(x), likeliest(x), likeliest(y, z)] == [
        x,
        z,
        y,
        x,
        x,
        z,
    ]


def test_bad_words_behind_a_space() -> None:
    sampler = request(temperature=0.0, bad_words=["a"], tokenizer=spelled("a", " a", "b")).sequences[0].sampler
    assert sampler.sample(np.array([3.0, 2.0, 1.0], dtype=np.float32)) == 2


def test_text_without_a_tokenizer() -> None:
    found = request(tokenizer=None, logprobs=1)
    feed(found.sequences[0], [A, B, EOS], LOGITS)
    completion = last(found).outputs[0]
    assert (completion.text, completion.token_ids, completion.finish_reason) == ("", [A, B, EOS], "stop")
    assert completion.logprobs is not None
    assert completion.logprobs[0][A].decoded_token is None
    for values in ({"stop": "a"}, {"bad_words": ["a"]}):
        with pytest.raises(
            SamplingParamsError, match="stop and bad_words need a tokenizer; leave them out, or load one"
        ):
            request(tokenizer=None, **values)
