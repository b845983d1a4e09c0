"""Prompts in all their forms, and what is none, through every way in."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from furiosa_llm.runtime.artifact.errors import FuriosaLLMError
from furiosa_llm.runtime.async_engine import AsyncLLMEngine
from furiosa_llm.runtime.errors import ContextLengthError, InputError, SamplingParamsError, TokenizerError
from furiosa_llm.runtime.llm_engine import LLMEngine
from furiosa_llm.runtime.requests.prompts import check_token_ids, paired, read_prompt
from furiosa_llm.runtime.tokens.sampling_params import SamplingParams
from tests.support.runtime.bracketed import bracketed_tokenizer
from tests.support.runtime.cores import make_core
from tests.support.runtime.runners import VOCAB, CountingRunner

GREEDY = SamplingParams(temperature=0.0, max_tokens=4)


@pytest.fixture
def engine() -> Iterator[LLMEngine]:
    with LLMEngine(make_core(CountingRunner)) as made:
        yield made


def test_token_ids_of_the_model() -> None:
    assert check_token_ids([0, 8, np.int64(3), *np.array([4, 5], dtype=np.int32)], 9) == [0, 8, 3, 4, 5]
    assert all(type(token) is int for token in check_token_ids(list(np.array([4, 5])), 9))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([0, 9], r"prompt_token_ids\[1\] is 9, but the model's tokens are 0 to 8"),
        ([-1], r"prompt_token_ids\[0\] is -1, but the model's tokens are 0 to 8"),
        ([True], r"prompt_token_ids\[0\] is True of type bool, expected an integer"),
        ([1.0], r"prompt_token_ids\[0\] is 1\.0 of type float, expected an integer"),
        (["1"], r"prompt_token_ids\[0\] is '1' of type str, expected an integer"),
        ([[1]], r"prompt_token_ids\[0\] is \[1\] of type list, expected an integer"),
        ([None], r"prompt_token_ids\[0\] is None of type NoneType, expected an integer"),
    ],
)
def test_tokens_that_the_model_does_not_have(tokens: list[Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_token_ids(tokens, 9)


def test_what_is_read_of_a_prompt(tmp_path: Path) -> None:
    tokenizer = bracketed_tokenizer(tmp_path)
    assert read_prompt("a b", tokenizer, 9) == ("a b", [3, 4])
    assert read_prompt({"prompt": "a b"}, tokenizer, None, add_special_tokens=True) == ("a b", [1, 3, 4, 2])
    assert read_prompt("a b", tokenizer, 9, add_special_tokens=True, max_length=3) == ("a b", [1, 3, 2])
    forms: list[Any] = [
        [5, 6],
        (5, 6),
        np.array([5, 6]),
        {"prompt_token_ids": [5, 6]},
        {"prompt_token_ids": np.array([5, 6])},
    ]
    for ids in forms:
        assert read_prompt(ids, None, 9) == (None, [5, 6])
    assert read_prompt({"prompt": "a", "prompt_token_ids": [5, 6]}, None, 9, max_length=1) == ("a", [5])
    assert read_prompt([2**31 - 1], None, None) == (None, [2**31 - 1])
    with pytest.raises(InputError, match="the model's tokens are 0 to 2147483647"):
        read_prompt([2**31], None, None)


def test_prompts_and_their_token_ids() -> None:
    assert paired("a", None) == (["a"], True)
    assert paired(["a", [5]], None) == (["a", [5]], False)
    assert paired([], None) == ([], False)
    assert paired("a", [5]) == ([{"prompt": "a", "prompt_token_ids": [5]}], True)
    assert paired(["a"], [[5]]) == ([{"prompt": "a", "prompt_token_ids": [5]}], False)
    assert paired(None, [5, 6]) == ([{"prompt_token_ids": [5, 6]}], True)
    assert paired(None, [[5], [6]]) == ([{"prompt_token_ids": [5]}, {"prompt_token_ids": [6]}], False)
    assert paired(None, []) == ([], False)
    for given in ([[5], [6]], [5, 6], 5):
        with pytest.raises(InputError, match=r"prompt_token_ids has \d sequences for 3 prompts"):
            paired(["a", "b", "c"], given)
    with pytest.raises(InputError, match="prompts: found None"):
        paired(None, None)


BAD = [
    ("", InputError, "the prompt has no tokens; give a prompt that is not empty"),
    ([], InputError, "the prompt has no tokens"),
    ({"prompt_token_ids": []}, InputError, "the prompt has no tokens"),
    (3, InputError, "Unsupported prompt type: int 3; give a str, a list of token ids"),
    (None, InputError, "Unsupported prompt type: NoneType"),
    (b"x", InputError, "Unsupported prompt type: bytes"),
    (["x"], InputError, "Unsupported prompt type: list"),
    ([True], InputError, "Unsupported prompt type: list"),
    (np.array([[5]]), InputError, "Unsupported prompt type: ndarray"),
    ({"prompt": "a", "x": 1}, InputError, "Unsupported prompt type: found 'x', expected 'prompt' or"),
    ({"prompt_token_ids": 3}, InputError, "'prompt_token_ids' is a int, expected a list of integers"),
    ({"prompt_token_ids": "5"}, InputError, "'prompt_token_ids' is a str, expected a list of integers"),
    ({"prompt_token_ids": [1.0]}, InputError, r"prompt_token_ids\[0\] is 1.0 of type float, expected an integer"),
    ({"prompt_token_ids": [1, VOCAB]}, InputError, r"prompt_token_ids\[1\] is 32, but the model's tokens are 0 to 31"),
    ({"prompt_token_ids": [-1]}, InputError, r"prompt_token_ids\[0\] is -1"),
    ("\ud800", TokenizerError, "expected text of Unicode characters only"),
    ([1] * 64, ContextLengthError, "maximum input context length is 63 tokens, however you requested 64 tokens"),
]


@pytest.mark.parametrize(("prompt", "error", "message"), BAD, ids=[f"{bad[0]!r:.30}" for bad in BAD])
def test_what_is_no_prompt_is_refused_by_every_engine(
    prompt: Any, error: type[FuriosaLLMError], message: str, engine: LLMEngine
) -> None:
    with pytest.raises(error, match=message) as caught:
        engine.add_request("a", prompt, GREEDY)
    assert isinstance(caught.value, ValueError)
    assert not engine.has_unfinished_requests()

    async def ask() -> None:
        await anext(AsyncLLMEngine(engine.core).generate(prompt, GREEDY, "a"))

    with pytest.raises(error, match=message):
        asyncio.run(ask())
    assert [replica.num_requests for replica in engine.core.replicas] == [0]


@pytest.mark.parametrize("name", ["stop_token_ids", "allowed_token_ids", "logit_bias"])
def test_parameters_that_name_unknown_tokens(name: str, engine: LLMEngine) -> None:
    for token in (VOCAB - 1, VOCAB):
        value: Any = {token: 1.0} if name == "logit_bias" else [token]
        params = SamplingParams(temperature=0.0, max_tokens=1, **{name: value})
        if token < VOCAB:
            engine.add_request("known", [5], params)
            continue
        with pytest.raises(SamplingParamsError, match=rf"{name} holds \[32\], but the model's tokens are 0 to 31"):
            engine.add_request("unknown", [5], params)
    assert [output.request_id for output in engine.step()] == ["known"]
