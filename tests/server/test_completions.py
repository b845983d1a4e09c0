"""`/v1/completions` through the openai client: the answers are those of the offline engine."""

from __future__ import annotations

import itertools
from typing import Any

import openai
import pytest

from furiosa_llm import LLM, SamplingParams
from tests.server.conftest import NAME

GREEDY: dict[str, Any] = {"model": NAME, "temperature": 0, "max_tokens": 8}
TEXTS = ["hello", "the quick brown fox", "你好 wörld"]


def offline(llm: LLM, prompt: str | list[int], **params: Any) -> Any:
    token_ids = llm.tokenizer.encode(prompt, add_special_tokens=True) if isinstance(prompt, str) else prompt
    params = {"temperature": 0.0, "max_tokens": 8, **params}
    return llm.generate("", SamplingParams(**params), token_ids)


def test_a_text(client: openai.OpenAI, llm: LLM) -> None:
    answer = client.completions.create(prompt=TEXTS[1], **GREEDY)
    expected = offline(llm, TEXTS[1])
    [choice] = answer.choices
    assert (choice.text, choice.finish_reason, choice.index) == (expected.outputs[0].text, "length", 0)
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    assert answer.model == NAME
    assert answer.usage is not None
    prompt = len(expected.prompt_token_ids)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (prompt, 8)
    assert answer.usage.total_tokens == prompt + 8


@pytest.mark.parametrize("stream", [False, True])
def test_several_prompts_of_several_completions_are_in_order(client: openai.OpenAI, llm: LLM, stream: bool) -> None:
    asked: dict[str, Any] = {"model": NAME, "prompt": TEXTS, "n": 2, "seed": 7, "max_tokens": 6, "temperature": 0.9}
    texts = [""] * 6
    if stream:
        for chunk in client.completions.create(**asked, stream=True):
            texts[chunk.choices[0].index] += chunk.choices[0].text
    else:
        answer = client.completions.create(**asked)
        assert [choice.index for choice in answer.choices] == list(range(6))
        texts = [choice.text for choice in answer.choices]
    expected = [offline(llm, text, n=2, seed=7, max_tokens=6, temperature=0.9).outputs for text in TEXTS]
    assert texts == [one.text for one in itertools.chain(*expected)]
    assert len(set(texts)) == 6


def test_token_ids(client: openai.OpenAI, llm: LLM) -> None:
    one = client.completions.create(prompt=[5, 6, 7], **GREEDY)
    two = client.completions.create(prompt=[[5, 6, 7], [8]], **GREEDY)
    expected = [offline(llm, ids).outputs[0].text for ids in ([5, 6, 7], [8])]
    assert [choice.text for choice in one.choices] == expected[:1]
    assert [choice.text for choice in two.choices] == expected


def test_a_stream_adds_up_and_counts(client: openai.OpenAI, llm: LLM) -> None:
    chunks = list(
        client.completions.create(prompt=TEXTS[2], stream=True, stream_options={"include_usage": True}, **GREEDY)
    )
    *pieces, last = chunks
    expected = offline(llm, TEXTS[2])
    assert "".join(chunk.choices[0].text for chunk in pieces) == expected.outputs[0].text
    assert [chunk.choices[0].finish_reason for chunk in pieces] == [None] * (len(pieces) - 1) + ["length"]
    assert [chunk.usage for chunk in pieces] == [None] * len(pieces)
    assert last.choices == []
    assert last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (len(expected.prompt_token_ids), 8)
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_without_usage_has_none(client: openai.OpenAI) -> None:
    chunks = list(client.completions.create(prompt="hello", stream=True, **GREEDY))
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_with_echo_are_those_of_the_engine(client: openai.OpenAI, llm: LLM, stream: bool) -> None:
    asked: dict[str, Any] = {**GREEDY, "prompt": "hello", "echo": True, "logprobs": 2}
    if stream:
        choices = [chunk.choices[0] for chunk in client.completions.create(**asked, stream=True)]
    else:
        choices = client.completions.create(**asked).choices
    found = [choice.logprobs for choice in choices if choice.logprobs is not None]
    expected = offline(llm, "hello", logprobs=2, prompt_logprobs=2)
    token_ids = [*expected.prompt_token_ids, *expected.outputs[0].token_ids]
    entries = [*expected.prompt_logprobs, *expected.outputs[0].logprobs]

    def joined(name: str) -> list[Any]:
        return [value for one in found for value in getattr(one, name)]

    texts = llm.tokenizer.decode_each(token_ids)
    assert joined("tokens") == texts
    assert joined("text_offset") == [sum(map(len, texts[:at])) for at in range(len(texts))]
    values = [None if at is None else at[token].logprob for token, at in zip(token_ids, entries, strict=True)]
    assert values[0] is None
    assert joined("token_logprobs")[1:] == pytest.approx(values[1:], rel=1e-6)
    for top, at in zip(joined("top_logprobs")[1:], entries[1:], strict=True):
        assert top == pytest.approx({one.decoded_token: one.logprob for one in at.values()}, rel=1e-6)
    assert "".join(choice.text for choice in choices) == "hello" + expected.outputs[0].text


@pytest.mark.parametrize("stream", [False, True])
def test_an_echo_of_no_tokens(client: openai.OpenAI, stream: bool) -> None:
    asked: dict[str, Any] = {"model": NAME, "prompt": "hello", "max_tokens": 0, "echo": True, "logprobs": 1}
    if stream:
        *chunks, last = client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
        [choice] = [chunk.choices[0] for chunk in chunks]
        usage = last.usage
    else:
        answer = client.completions.create(**asked)
        [choice], usage = answer.choices, answer.usage
    assert (choice.text, choice.finish_reason) == ("hello", "length")
    assert choice.logprobs is not None
    assert choice.logprobs.tokens == ["he", "ll", "o"]
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (3, 0)


def test_an_echo_of_token_ids_is_their_text(client: openai.OpenAI, llm: LLM) -> None:
    token_ids = llm.tokenizer.encode("hello")
    answer = client.completions.create(prompt=token_ids, echo=True, **GREEDY)
    assert answer.choices[0].text == "hello" + offline(llm, token_ids).outputs[0].text


def test_stop_and_what_the_vendor_has(client: openai.OpenAI, llm: LLM) -> None:
    whole = offline(llm, "hello").outputs[0]
    stop = whole.text[4:7]
    stopped = client.completions.create(prompt="hello", stop=[stop], **GREEDY).choices[0]
    assert (stopped.text, stopped.finish_reason) == (whole.text.partition(stop)[0], "stop")
    assert stopped.model_extra is not None
    assert stopped.model_extra["stop_reason"] == stop
    extra = {"stop_token_ids": [whole.token_ids[2]], "min_tokens": 2, "top_k": 3, "min_p": 0.1, "ignore_eos": True}
    token = client.completions.create(prompt="hello", extra_body=extra, **GREEDY).choices[0]
    assert token.model_extra is not None
    assert (token.finish_reason, token.model_extra["stop_reason"]) == ("stop", whole.token_ids[2])


def test_every_sampling_parameter_reaches_the_engine(client: openai.OpenAI, llm: LLM) -> None:
    params: dict[str, Any] = {
        "presence_penalty": 1.5,
        "frequency_penalty": -1.0,
        "temperature": 1.3,
        "top_p": 0.9,
        "seed": 11,
        "max_tokens": 24,
    }
    extra: dict[str, Any] = {
        "repetition_penalty": 1.4,
        "top_k": 40,
        "min_p": 0.02,
        "bad_words": ["you"],
        "min_tokens": 3,
    }
    bias = {"300": 5.0}
    answer = client.completions.create(model=NAME, prompt="hello", logit_bias=bias, extra_body=extra, **params)  # type: ignore[arg-type]
    expected = offline(llm, "hello", logit_bias={300: 5.0}, **params, **extra)
    assert answer.choices[0].text == expected.outputs[0].text


def test_the_best_of_several(client: openai.OpenAI, llm: LLM) -> None:
    answer = client.completions.create(model=NAME, prompt="hello", n=1, best_of=4, seed=3, max_tokens=5)
    expected = offline(llm, "hello", n=1, best_of=4, seed=3, max_tokens=5, temperature=1.0)
    assert [choice.text for choice in answer.choices] == [one.text for one in expected.outputs]


def test_any_whole_number_is_a_seed(client: openai.OpenAI) -> None:
    texts = [
        client.completions.create(model=NAME, prompt="hello", seed=seed, max_tokens=12).choices[0].text
        for seed in (-1, 2**64 - 1, 2**65 - 1, -2)
    ]
    assert texts[0] == texts[1] == texts[2] != texts[3]


def test_a_whole_number_may_be_written_with_a_point(client: openai.OpenAI, llm: LLM) -> None:
    answer = client.post(
        "/completions",
        body={**GREEDY, "prompt": [5.0, 6], "max_tokens": 3.0, "seed": 1.0},
        cast_to=openai.types.Completion,
    )
    assert answer.choices[0].text == offline(llm, [5, 6], max_tokens=3).outputs[0].text
