"""Answers that have to keep to a form, of models that think first: the form is that of what they say."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from tokenizers import Tokenizer as RawTokenizer

from furiosa_llm import StructuredOutputsParams
from furiosa_llm.runtime.requests import request
from furiosa_llm.runtime.tokens.grammar import Grammars
from furiosa_llm.runtime.tokens.tokenizer import Tokenizer
from furiosa_llm.server.call_formats import REASONING_FORMATS
from furiosa_llm.server.reasoning import behind_thoughts
from furiosa_llm.server.settings import ServerSettings
from tests.server.conftest import NAME, load, serving
from tests.support.server.scripted import REFUSED, scripted

FORMS = [
    (StructuredOutputsParams(json={"type": "object"}), '{"a":1}'),
    (StructuredOutputsParams(regex="[0-9]{3}"), "123"),
    (StructuredOutputsParams(choice=["123", "no"]), "123"),
    (StructuredOutputsParams(grammar='start: "12" x\nx: "3"'), "123"),
    (StructuredOutputsParams(grammar='root ::= "12" x\nx ::= "3"'), "123"),
]
TEXTS = [
    ("qwen3", "x", "ANSWER", True),
    ("qwen3", "x", "<think>\nx </th ANSWER\n</think>\n\nANSWER", True),
    ("qwen3", "x", "<think>ANSWER", False),
    ("qwen3", "x", "x ANSWER", False),
    ("qwen3", "x<think>\n", "ANSWER", False),
    ("qwen3", "x<think>\n", "\nxx</think>\nANSWER", True),
    ("qwen3", "x<think>\n", "<think>xx</think>\nANSWER", True),
    ("qwen3", "x<think>\n", "xx</think> x ANSWER", False),
    ("qwen3", "x<think></think>\n\n", "ANSWER", True),
    ("qwen3", "x<think></think>\n\n", "x</think>ANSWER", False),
    ("deepseek_r1", "x", "ANSWER", False),
    ("deepseek_r1", "x", "xx\n</think>\n\nANSWER", True),
    ("mistral", "x", "[THINK]x[/THINK]ANSWER", True),
    ("granite", "x", "Here is my thought process: x\n\nHere is my response: ANSWER", True),
]


@pytest.fixture(scope="module", params=[False, True], ids=["spelled", "tokens"])
def tokenizer(request: pytest.FixtureRequest, zoo: Path) -> Tokenizer:
    """One that spells the marks of thoughts, and one that has tokens for them."""
    raw = RawTokenizer.from_file(str(zoo / NAME / "tokenizer.json"))
    if request.param:
        raw.add_special_tokens(["<think>", "</think>"])
    return Tokenizer.of_text(raw.to_str(), {}, None)


def fits(constraint: StructuredOutputsParams, text: str, tokenizer: Tokenizer, grammars: Grammars) -> bool:
    """Whether each token of `text` may follow, and then the end."""
    end = 2
    followed = grammars.compile(constraint.llguidance_grammar).start([end])
    for token in [*tokenizer.encode(text, add_special_tokens=False), end]:
        scores = np.zeros(tokenizer.vocab_size, np.float32)
        followed.mask(scores)
        if not np.isfinite(scores[token]):
            return False
        followed.record(token)
        if followed.complete:
            break
    return followed.complete


def test_the_form_is_that_of_what_is_said(tokenizer: Tokenizer) -> None:
    grammars = Grammars(tokenizer)
    for (constraint, answer), (form, prompt, text, allowed) in itertools.product(FORMS, TEXTS):
        whole = behind_thoughts(constraint, REASONING_FORMATS[form], prompt, tokenizer.tags)
        found = fits(whole, text.replace("ANSWER", answer), tokenizer, grammars)
        assert found is allowed, (constraint, form, prompt, text)


@pytest.fixture
def asked(artifact: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A server whose template begins a thought, and the folder of what its model says."""
    sampler = scripted(tmp_path, RawTokenizer.from_file(str(artifact / "tokenizer.json")))
    monkeypatch.setattr(request, "Sampler", sampler)
    settings = ServerSettings(
        chat_template="{{ messages[-1].content }}<think>\n",
        reasoning_parser="qwen3",
        tool_call_parser="hermes",
    )
    with serving(load(artifact), settings) as url:
        yield url, tmp_path


def test_formats_and_forced_calls_behind_thoughts(asked: tuple[str, Path]) -> None:
    url, folder = asked
    schema = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"], "additionalProperties": False}
    format_ = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    call = '<tool_call>\n{"name": "f", "arguments": {"a":1}}\n</tool_call>'
    body: dict[str, Any] = {"model": NAME, "messages": [{"role": "user", "content": "x"}], "max_tokens": 200}
    for more, said in (
        ({"response_format": format_}, '{"a":1}'),
        ({"guided_choice": ["no", "yes"]}, "yes"),
        ({"tools": [tool], "tool_choice": "required"}, call),
    ):
        (folder / "0.txt").write_text(f"Hm.\n</think>\n\n{said}")
        message = httpx.post(f"{url}/v1/chat/completions", json={**body, **more}).json()["choices"][0]["message"]
        assert not (folder / REFUSED).exists(), (folder / REFUSED).read_text()
        assert message["reasoning_content"].strip() == "Hm."
        if "tools" in more:
            assert json.loads(message["tool_calls"][0]["function"]["arguments"]) == {"a": 1}
        else:
            assert message["content"] == said
