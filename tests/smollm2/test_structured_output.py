"""SmolLM2 answers in JSON that means something, and its 49,152 tokens are constrained at once."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from furiosa_llm import LLM, SamplingParams, StructuredOutputsParams
from furiosa_llm.example.smollm2.recipe import ensure
from furiosa_llm.runtime.tokens.grammar import Grammars
from furiosa_llm.runtime.tokens.tokenizer import Tokenizer
from tests.support.artifacts import smollm2_artifact

pytestmark = pytest.mark.real_model

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 40}, "country": {"enum": ["France", "Korea"]}},
    "required": ["city", "country"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def model() -> Path:
    folder: Path = ensure("int4", console=Console(quiet=True))
    return folder


def test_an_answer_in_json() -> None:
    wanted = StructuredOutputsParams(json=SCHEMA, disable_any_whitespace=True)
    question = [{"role": "user", "content": "Paris is the capital of which country? Answer in JSON."}]
    with LLM.load_artifact(smollm2_artifact("int4")) as llm:
        params = SamplingParams(temperature=0.0, max_tokens=60, structured_outputs=wanted)
        [completion] = llm.chat(question, params)[0].outputs
        assert completion.finish_reason == "stop"
        assert json.loads(completion.text) == {"city": "Paris", "country": "France"}
        babble = SamplingParams(temperature=3.0, seed=1, max_tokens=300, structured_outputs=wanted)
        [completion] = llm.chat(question, babble)[0].outputs
        if completion.finish_reason == "stop":
            assert set(json.loads(completion.text)) == {"city", "country"}
        else:
            assert completion.text.startswith('{"city":"')


def test_logits_wider_than_the_vocabulary(model: Path) -> None:
    tokenizer = Tokenizer.from_folder(model)
    grammar = Grammars(tokenizer).compile(StructuredOutputsParams(regex="(.|\n)+").llguidance_grammar)
    width = tokenizer.vocab_size + 100
    scores = np.zeros(width, np.float32)
    grammar.start([2]).mask(scores)
    allowed = np.flatnonzero(scores == 0.0)
    assert allowed.size > 48_000
    assert allowed.max() < tokenizer.vocab_size
    assert not set(allowed.tolist()) & tokenizer.special_ids
