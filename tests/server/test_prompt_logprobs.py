"""Prompt log probabilities over HTTP, asked for as lm-eval does: of the offline engine, and of the unsplit model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import openai
import pytest

from fixtures.perplexity import prefill_inputs
from furiosa_llm import LLM, SamplingParams
from tests.server.conftest import NAME

PROMPTS = [[5, 6, 7, 300, 12, 900, 1, 2, 44], [8, 9], [1000], [3, 77, 512, 4]]


def scored(client: openai.OpenAI, prompt: Any, max_tokens: int = 1) -> list[Any]:
    answer = client.completions.create(
        model=NAME, prompt=prompt, temperature=0, max_tokens=max_tokens, logprobs=1, seed=1234, echo=True
    )
    return [choice.logprobs for choice in answer.choices]


def unsplit(model: Path, tokens: list[int]) -> np.ndarray[Any, Any]:
    """The log probabilities of all tokens at each place behind the first."""
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    ids = np.array([tokens], dtype=np.int64)
    (logits,) = session.run(["logits"], prefill_inputs(model.parent, session, ids))
    scores = logits[0, :-1].astype(np.float64)
    shifted = scores - scores.max(axis=-1, keepdims=True)
    result: np.ndarray[Any, Any] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_they_are_those_of_the_offline_engine(client: openai.OpenAI, llm: LLM, max_tokens: int) -> None:
    found = scored(client, PROMPTS, max_tokens)
    params = SamplingParams(temperature=0.0, max_tokens=1, logprobs=1, prompt_logprobs=1)
    for logprobs, tokens in zip(found, PROMPTS, strict=True):
        [expected] = llm.generate([""], params, [tokens])
        assert expected.prompt_logprobs is not None
        own = [
            None if at is None else at[token].logprob
            for token, at in zip(tokens, expected.prompt_logprobs, strict=True)
        ]
        assert logprobs.token_logprobs[: len(tokens)] == own
        assert len(logprobs.token_logprobs) == len(tokens) + max_tokens  # lm-eval leaves out the last one
        for at, top in zip(expected.prompt_logprobs[1:], logprobs.top_logprobs[1:], strict=False):
            assert at is not None
            assert max(top.values()) == max(one.logprob for one in at.values())


def test_they_are_those_of_the_unsplit_model(client: openai.OpenAI, zoo: Path) -> None:
    for logprobs, tokens in zip(scored(client, PROMPTS), PROMPTS, strict=True):
        assert logprobs.token_logprobs[0] is None
        if len(tokens) == 1:
            continue
        expected = unsplit(zoo / NAME / "model.onnx", tokens)
        own = expected[np.arange(len(tokens) - 1), tokens[1:]]
        np.testing.assert_allclose(logprobs.token_logprobs[1 : len(tokens)], own, atol=1e-3, rtol=0)
        best = [max(top.values()) for top in logprobs.top_logprobs[1 : len(tokens)]]
        np.testing.assert_allclose(best, expected.max(axis=-1), atol=1e-3, rtol=0)


def test_a_prompt_that_ends_the_text_still_has_a_token_behind_it(client: openai.OpenAI, llm: LLM) -> None:
    """What lm-eval leaves out at the end is the token that was generated, even if that is the end of the text."""
    answer = client.completions.create(
        model=NAME, prompt=PROMPTS[0], max_tokens=1, logprobs=1, echo=True, extra_body={"allowed_token_ids": [2]}
    )
    [choice] = answer.choices
    assert choice.finish_reason == "stop"
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs is not None
    assert len(choice.logprobs.token_logprobs) == len(PROMPTS[0]) + 1


def test_prompts_beyond_the_limit_are_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="maximum input context length is 511 tokens"):
        scored(client, [[1, 2], [5] * 512])
    [logprobs] = scored(client, [[5] * 511])
    assert len(logprobs.token_logprobs) == 512
