"""Every sampling parameter against values of wrong types and out of range."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest

from furiosa_llm.runtime import RequestOutputKind, SamplingParams, StructuredOutputsParams
from furiosa_llm.runtime.artifact.errors import FuriosaLLMError
from furiosa_llm.runtime.errors import SamplingParamsError
from furiosa_llm.runtime.tokens.sampling_params import SamplingType

NAN, INF = float("nan"), float("inf")
NO_INTEGERS = [1.0, "1", True, [1], 2**64, -(2**64), 10**5000]
NO_NUMBERS = ["0.5", True, [0.5], 1j, NAN, INF, -INF, 10**400, 10**5000]
NO_FLAGS = [1, 0, None, "True"]
NO_LISTS: list[Any] = [None, 5, {5}, range(3)]
NO_TOKENS = [[-1], [1.0], ["5"], [True], [None], [2**64], list(range(1025))]

REFUSED: dict[str, list[Any]] = {
    "n": [0, -1, 129, None, *NO_INTEGERS],
    "best_of": [0, -1, 129, *NO_INTEGERS],
    "presence_penalty": [-2.1, 2.1, None, *NO_NUMBERS],
    "frequency_penalty": [-2.1, 2.1, None, *NO_NUMBERS],
    "repetition_penalty": [0.0, -1.0, None, *NO_NUMBERS],
    "temperature": [-0.1, None, *NO_NUMBERS],
    "top_p": [-0.1, 1.1, None, *NO_NUMBERS],
    "top_k": [-2, None, *NO_INTEGERS],
    "min_p": [-0.1, 1.1, None, *NO_NUMBERS],
    "use_beam_search": [True, *NO_FLAGS],
    "length_penalty": [0.9, None, *NO_NUMBERS],
    "early_stopping": [True, "never", "always", 0, None],
    "max_tokens": [0, -1, *NO_INTEGERS],
    "min_tokens": [-1, 17, None, *NO_INTEGERS],
    "output_kind": [0, 2, "DELTA", None, 7],
    "seed": [-1, *NO_INTEGERS],
    "stop": [[""], "", ["a", 5], "a" * 4097, ["a"] * 1025, b"a", *NO_LISTS],
    "stop_token_ids": ["5", *NO_TOKENS, *NO_LISTS],
    "ignore_eos": NO_FLAGS,
    "include_stop_str_in_output": NO_FLAGS,
    "logprobs": [-1, 21, *NO_INTEGERS],
    "prompt_logprobs": [-1, 21, *NO_INTEGERS],
    "logit_bias": [
        *({token: 1.0} for token in (-1, 1.0, "5", True, None, 2**64)),
        *({5: bias} for bias in (-100.1, 100.1, None, *NO_NUMBERS)),
        *(dict.fromkeys(range(1025), 1.0), [5], None, 5),
    ],
    "allowed_token_ids": [[], "5", 5, {5}, *NO_TOKENS],
    "bad_words": ["word", [""], [5], ["a" * 4097], ["a"] * 1025, *NO_LISTS],
    "structured_outputs": [{"json": {}}, "a", 1],
    "skip_special_tokens": NO_FLAGS,
    "detokenize": NO_FLAGS,
}

ACCEPTED: dict[str, list[Any]] = {
    "n": [1, 2, 128, np.int64(3)],
    "best_of": [None, 1, 128],
    "presence_penalty": [-2, 2.0, 0, np.float32(0.5)],
    "frequency_penalty": [-2.0, 2],
    "repetition_penalty": [1e-9, 2, 2.5],
    "temperature": [0, 1e-9, 1e300],
    "top_p": [0, 1e-9, 1],
    "top_k": [-1, 0, 1, 10**6],
    "min_p": [0, 1],
    "use_beam_search": [False],
    "length_penalty": [1, 1.0],
    "early_stopping": [False],
    "max_tokens": [None, 1, 10**6],
    "min_tokens": [0, 16],
    "output_kind": list(RequestOutputKind),
    "seed": [None, 0, 2**64 - 1],
    "stop": ["a", [], ["a", "bc"], ("a",), "a" * 4096],
    "stop_token_ids": [[], [0, 5], (5,), [np.int64(5)]],
    "ignore_eos": [True, False],
    "include_stop_str_in_output": [True, False],
    "logprobs": [None, 0, 20],
    "prompt_logprobs": [None, 0, 20],
    "logit_bias": [{}, {0: 100, 5: -100.0}],
    "allowed_token_ids": [None, [0], (5, 6)],
    "bad_words": [[], ["a", "b c"]],
    "structured_outputs": [None, StructuredOutputsParams(regex="a")],
    "skip_special_tokens": [True, False],
    "detokenize": [True, False],
}


def test_the_tables_have_every_parameter() -> None:
    names = [field.name for field in fields(SamplingParams)]
    assert list(REFUSED) == list(ACCEPTED) == names


@pytest.mark.parametrize("name", REFUSED)
def test_values_of_a_wrong_type_or_out_of_range_are_refused(name: str) -> None:
    for value in REFUSED[name]:
        with pytest.raises(SamplingParamsError, match=name) as caught:
            SamplingParams(**{name: value})
        assert isinstance(caught.value, ValueError)
        assert isinstance(caught.value, FuriosaLLMError)
        assert len(str(caught.value)) < 250


@pytest.mark.parametrize("name", ACCEPTED)
def test_values_in_range_are_taken(name: str) -> None:
    for value in ACCEPTED[name]:
        found = getattr(SamplingParams(**{name: value}), name)
        assert found == (tuple(value) if isinstance(value, list) else value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n": 0}, r"n must be at least 1, got 0\."),
        ({"n": "2"}, r"n must be an integer, got '2'\."),
        ({"n": 129}, r"n must be at most 128, got 129\."),
        ({"n": 3, "best_of": 2}, r"best_of must be greater than or equal to n, got n=3 and best_of=2\."),
        ({"presence_penalty": -3}, r"presence_penalty must be in \[-2, 2\], got -3\."),
        ({"frequency_penalty": 2.5}, r"frequency_penalty must be in \[-2, 2\], got 2\.5\."),
        ({"repetition_penalty": 0.0}, r"repetition_penalty must be greater than 0, got 0\.0\."),
        ({"temperature": -1.0}, r"temperature must be non-negative, got -1\.0\."),
        ({"temperature": NAN}, r"temperature must be non-negative, got nan\."),
        ({"temperature": INF}, r"temperature must be finite, got inf\."),
        ({"temperature": "hot"}, r"temperature must be a number, got 'hot'\."),
        (
            {"temperature": 10**5000},
            r"temperature must be finite, got a value of type int that is too long to write out",
        ),
        ({"top_p": -0.1}, r"top_p must be in \[0, 1\], got -0\.1\."),
        ({"top_k": -2}, r"top_k must be -1 or 0 \(disable\), or at least 1, got -2\."),
        ({"min_p": 1.5}, r"min_p must be in \[0, 1\], got 1\.5\."),
        ({"max_tokens": 0}, r"max_tokens must be at least 1, got 0\."),
        ({"min_tokens": -1}, r"min_tokens must be greater than or equal to 0, got -1\."),
        ({"min_tokens": 17}, r"min_tokens must be less than or equal to max_tokens=16, got 17\."),
        ({"early_stopping": True}, "early_stopping is not effective and must be False when not using beam search"),
        ({"early_stopping": "often"}, r"early_stopping must be True, False, or 'never', got 'often'\."),
        ({"length_penalty": 2.0}, r"length_penalty is not effective and must be the default value of 1\.0"),
        ({"use_beam_search": True}, "furiosa-llm currently does not support beam search; .* give best_of"),
        ({"stop": ["a", ""]}, "stop must not hold an empty string"),
        (
            {"stop": "a", "detokenize": False},
            "stop needs the text of the completion, which detokenize=False leaves out",
        ),
        ({"stop": "a" * 5000}, r"stop must hold strings of at most 4096 characters, got one of 5000\."),
        ({"stop_token_ids": [3, -1]}, r"stop_token_ids: a token id must be non-negative, got -1\."),
        ({"stop_token_ids": "35"}, r"stop_token_ids must be a list of token ids, got '35'\."),
        ({"seed": -1}, r"seed must be non-negative, got -1\."),
        ({"seed": 2**64}, r"seed must be less than 2\*\*64, got 18446744073709551616\."),
        ({"logprobs": -1}, r"logprobs must be in \[0, 20\], got -1\."),
        ({"logit_bias": {7: 101}}, r"logit_bias\[7\] must be in \[-100, 100\], got 101\."),
        ({"logit_bias": [7]}, r"logit_bias must be a mapping of token ids to numbers, got \[7\]\."),
        ({"allowed_token_ids": []}, "allowed_token_ids must not be empty; leave it out to allow every token"),
        ({"ignore_eos": 1}, r"ignore_eos must be True or False, got 1\."),
    ],
)
def test_what_refusals_say(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SamplingParamsError, match=message):
        SamplingParams(**values)


def test_several_completions() -> None:
    three = SamplingParams(n=3)
    assert (three.num_sequences, three.ranks_sequences) == (3, False)
    best = SamplingParams(n=2, best_of=5)
    assert (best.num_sequences, best.ranks_sequences) == (5, True)
    assert not SamplingParams(n=2, best_of=2).ranks_sequences


def test_no_limit_leaves_the_least_length_free() -> None:
    assert SamplingParams(max_tokens=None, min_tokens=500).min_tokens == 500


def test_from_optional_takes_none_for_the_default() -> None:
    params = SamplingParams.from_optional(temperature=None, top_k=5, max_tokens=None, stop=None, logit_bias=None)
    assert params == SamplingParams(top_k=5, max_tokens=None)
    with pytest.raises(SamplingParamsError, match="unknown sampling parameters: beams, waves"):
        SamplingParams.from_optional(waves=1, beams=3)


def test_from_optional_takes_tokens_as_json_writes_them() -> None:
    assert SamplingParams.from_optional(logit_bias={"7": 1.5, 8: 2}).logit_bias == {7: 1.5, 8: 2.0}
    for token in ("-7", "7.0", "²", "a", ""):
        with pytest.raises(SamplingParamsError, match="logit_bias: a token id must be an integer"):
            SamplingParams.from_optional(logit_bias={token: 1.0})


def test_parameters_do_not_change_with_what_they_were_made_from() -> None:
    stop, tokens, bias = ["a"], [5], {5: 1.0}
    params = SamplingParams(stop=stop, stop_token_ids=tokens, logit_bias=bias)
    stop.append("b")
    tokens.append(6)
    bias[6] = 1.0
    assert (params.stop, params.stop_token_ids, params.logit_bias) == (("a",), (5,), {5: 1.0})
    assert hash(params) == hash(SamplingParams(stop=["a"], stop_token_ids=[5], logit_bias={5: 1.0}))


def test_tokens_that_the_model_does_not_have() -> None:
    values: dict[str, Any] = {"stop_token_ids": [9, 10], "logit_bias": {10: 1.0}, "allowed_token_ids": [3, 10]}
    for name, value in values.items():
        params = SamplingParams(**{name: value})
        params.check_vocabulary(11)
        with pytest.raises(SamplingParamsError, match=rf"{name} holds \[10\], but the model's tokens are 0 to 9\."):
            params.check_vocabulary(10)


def test_kinds_and_stop_strings() -> None:
    assert SamplingParams().sampling_type is SamplingType.RANDOM
    assert SamplingParams(temperature=0.99e-5).sampling_type is SamplingType.GREEDY
    assert SamplingParams(temperature=1e-5).sampling_type is SamplingType.RANDOM
    assert SamplingParams(stop="xy").stop_strings == ("xy",)
    assert SamplingParams(stop=["x", "y"]).stop_strings == ("x", "y")
    assert RequestOutputKind(2) is RequestOutputKind.FINAL_ONLY
