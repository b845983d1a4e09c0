"""`StructuredOutputsParams`, and completions of a model that keep to them whatever else is asked of them."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
import re
import threading
from collections.abc import Iterator
from typing import Any

import jsonschema_rs
import pytest

from furiosa_llm import LLM, AsyncLLMEngine, LLMEngine, SamplingParams, StructuredOutputsParams
from furiosa_llm.runtime.errors import SamplingParamsError
from furiosa_llm.runtime.tokens.grammar import MAX_GRAMMAR_NBYTES, Grammar, Grammars
from tests.runtime.conftest import ZooArtifact
from tests.support.runtime.schemas import random_schema

MODEL = "tiny-llama-optimum"
WORD = StructuredOutputsParams(regex="[a-z]{3,12}")


@pytest.fixture(scope="module")
def llm(zoo_artifact: ZooArtifact) -> Iterator[LLM]:
    with LLM.load_artifact(zoo_artifact(MODEL).folder) as loaded:
        yield loaded


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({}, "structured_outputs: found nothing, expected one of json, regex, choice, grammar, json_object"),
    ({"json_object": False}, "found nothing"),
    ({"regex": "a", "choice": ["b"]}, "found regex and choice, expected one of"),
    ({"regex": "(a"}, "structured_outputs.regex cannot be compiled: .*unclosed group"),
    ({"regex": ""}, "structured_outputs.regex must be a text, got ''"),
    ({"regex": 3}, "structured_outputs.regex must be a text, got 3"),
    ({"regex": "\ud800"}, "structured_outputs.regex cannot be read: .*surrogates"),
    ({"json": {"type": "foo"}}, "structured_outputs.json cannot be compiled: Invalid type: foo"),
    ({"json": {"$ref": "#/$defs/x"}}, "Pointer '/\\$defs/x' does not exist"),
    ({"json": {"$ref": "http://localhost/x"}}, "does not fetch resources"),
    ({"json": {"type": "array", "uniqueItems": True}}, 'Unimplemented keys: \\["uniqueItems"\\]'),
    ({"json": {"type": "string", "pattern": "(?=a)"}}, "look-around"),
    ({"json": {"minimum": 2, "maximum": 1, "type": "integer"}}, "Unsatisfiable schema"),
    ({"json": "{"}, "structured_outputs.json is not JSON: Expecting"),
    ({"json": {"const": float("nan")}}, "structured_outputs.json is not JSON: Out of range"),
    ({"json": {"const": {1}}}, "structured_outputs.json is not JSON: .*set"),
    ({"json": [1]}, "found \\[1\\], expected a JSON schema"),
    ({"json": {"x-guidance": 3}}, "structured_outputs.json cannot be compiled: invalid type: integer"),
    ({"json": json.loads('{"items":' * 900 + "{}" + "}" * 900)}, "recursion"),
    ({"choice": []}, "structured_outputs.choice must not be empty"),
    ({"choice": ["a", ""]}, "structured_outputs.choice must not hold an empty string"),
    ({"choice": "ab"}, "structured_outputs.choice must be a list of strings"),
    ({"grammar": 'root ::= ("a"'}, "has no rule `start:`, and so is read as GBNF, which it is not: Expected '\\)'"),
    ({"grammar": "root ::= " + "(" * 5000}, "structured_outputs.grammar cannot be read: .*recursion"),
    ({"grammar": "start: foo"}, 'structured_outputs.grammar cannot be compiled: .*unknown name: "foo"'),
    ({"regex": "a" * MAX_GRAMMAR_NBYTES}, f"at most {MAX_GRAMMAR_NBYTES} are compiled; make it smaller"),
    ({"regex": "a", "disable_any_whitespace": True}, "are for JSON, not for regex"),
    ({"json": {}, "disable_any_whitespace": 1}, "disable_any_whitespace must be True or False"),
    ({"json": {}, "whitespace_pattern": "("}, "structured_outputs.json cannot be compiled"),
    ({"json": {}, "whitespace_pattern": " ", "disable_any_whitespace": True}, "exclude each other"),
    ({"json_object": 1}, "structured_outputs.json_object must be True or False"),
]


@pytest.mark.parametrize(("values", "message"), REFUSED)
def test_what_is_no_grammar(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SamplingParamsError, match=message):
        StructuredOutputsParams(**values)


def test_values_are_kept_as_what_cannot_change() -> None:
    schema = {"type": "object", "properties": {"ä": {"type": "integer"}}}
    made = StructuredOutputsParams(json=schema)
    assert made.json == '{"type":"object","properties":{"ä":{"type":"integer"}}}'
    assert made == StructuredOutputsParams(json=json.dumps(schema))
    assert hash(made) == hash(StructuredOutputsParams(json=made.json))
    assert StructuredOutputsParams(choice=["a", "b"]).choice == ("a", "b")
    params = SamplingParams(structured_outputs=made)
    assert dataclasses.replace(params, n=2).structured_outputs is made
    assert SamplingParams.from_optional(structured_outputs=None).structured_outputs is None


def test_other_types_are_refused() -> None:
    with pytest.raises(SamplingParamsError, match=r"must be StructuredOutputsParams, got \{'json'"):
        SamplingParams(structured_outputs={"json": {}})  # type: ignore[arg-type]


def complete(llm: LLM, structured: StructuredOutputsParams | None, **values: Any) -> Any:
    params = SamplingParams(structured_outputs=structured, **{"max_tokens": 60, **values})
    return llm.generate("hello", params).outputs[0]


@pytest.mark.parametrize(
    ("values", "pattern"),
    [
        ({"regex": "[0-9]{2,4}(px|em)"}, "[0-9]{2,4}(px|em)"),
        ({"choice": ["yes", "né\x01\n", "a/b\\"]}, "yes|né\x01\n|a/b\\\\"),
        ({"grammar": 'root ::= "(" [0-9]{1,3} ")"'}, "\\([0-9]{1,3}\\)"),
        ({"grammar": 'start: "<" WORD ">"\nWORD: /[a-f]{1,4}/'}, "<[a-f]{1,4}>"),
        ({"json": {"const": {"a": [1, 2]}}, "disable_any_whitespace": True}, '\\{"a":\\[1,2\\]\\}'),
        ({"json": {"const": {"a": 1}}, "whitespace_pattern": "_"}, '\\{_?"a"_?:_?1_?\\}'),
        ({"json": {"const": {"a": 1}, "x-guidance": {"whitespace_flexible": False}}}, '\\{"a":1\\}'),
    ],
)
def test_each_kind(llm: LLM, values: dict[str, Any], pattern: str) -> None:
    structured = StructuredOutputsParams(**values)
    for seed in range(3):
        completion = complete(llm, structured, temperature=3.0, seed=seed)
        assert completion.finish_reason == "stop"
        assert re.fullmatch(pattern, completion.text, re.DOTALL)


def test_blanks_have_an_end(llm: LLM) -> None:
    """However much a model likes them."""
    tokens = range(1024)
    spaces = [token for token, text in zip(tokens, llm.tokenizer.decode_each(tokens), strict=True) if text.isspace()]
    wanted = StructuredOutputsParams(json={"const": {"a": 1}})
    completion = complete(llm, wanted, temperature=0.0, logit_bias=dict.fromkeys(spaces, 100.0), max_tokens=200)
    assert json.loads(completion.text) == {"a": 1}
    assert max(map(len, re.findall(r"\s+", completion.text))) == 32


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_what_is_finished_meets_its_schema(llm: LLM, temperature: float) -> None:
    chance = random.Random(int(temperature))
    schemas = [random_schema(chance) for _ in range(24)]
    params = [
        SamplingParams(
            structured_outputs=StructuredOutputsParams(json=schema), temperature=temperature, seed=seed, max_tokens=400
        )
        for seed, schema in enumerate(schemas)
    ]
    outputs = llm.generate(["hello"] * len(schemas), params)
    finished = 0
    for schema, output in zip(schemas, outputs, strict=True):
        [completion] = output.outputs
        if completion.finish_reason == "stop":
            finished += 1
            jsonschema_rs.validator_for(schema, validate_formats=True).validate(json.loads(completion.text))
    assert finished >= 16


def test_neighbours_in_a_batch_have_no_part_in_it(llm: LLM) -> None:
    free = [SamplingParams(temperature=1.5, seed=seed, max_tokens=12) for seed in range(4)]
    bound = [SamplingParams(temperature=1.5, seed=seed, max_tokens=12, structured_outputs=WORD) for seed in range(4)]
    impossible = SamplingParams(structured_outputs=WORD, allowed_token_ids=[1], max_tokens=12)
    alone = [llm.generate("hello", one).outputs[0].token_ids for one in [*free, *bound]]
    engine = LLMEngine.from_llm(llm)
    for index, one in enumerate([*free, *bound, impossible]):
        engine.add_request(str(index), "hello", one)
    ended = {}
    while engine.has_unfinished_requests():
        ended.update({output.request_id: output for output in engine.step() if output.finished})
    assert [ended[str(index)].outputs[0].token_ids for index in range(8)] == alone
    assert "structured_outputs, allowed_token_ids" in str(ended["8"].error)


def test_nothing_is_made_ready_for_requests_without_it(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> Grammar:
        raise AssertionError("compiled")

    monkeypatch.setattr(Grammars, "compile", refuse)
    assert llm.generate("hello", SamplingParams(max_tokens=4)).outputs[0].token_ids


def test_preemption_does_not_lose_the_place(zoo_artifact: ZooArtifact, llm: LLM) -> None:
    structured = StructuredOutputsParams(regex="([a-z]{2}[0-9]{2})+")
    params = [
        SamplingParams(temperature=1.0, seed=seed, max_tokens=40, min_tokens=40, structured_outputs=structured)
        for seed in range(4)
    ]
    expected = [output.outputs[0] for output in llm.generate(["hello"] * 4, params)]
    with LLM.load_artifact(
        zoo_artifact(MODEL).folder, paged_attention_num_blocks=8, max_batch_size=4, max_model_len=96
    ) as small:
        found = [output.outputs[0] for output in small.generate(["hello"] * 4, params)]
        assert small.core.replicas[0]._scheduler.num_preemptions
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]
    assert all(re.fullmatch("([a-z]{2}[0-9]{2})*([a-z]{1,2}[0-9]?)?", one.text) for one in found)


def test_an_event_loop_goes_on_while_a_grammar_is_compiled(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    goes_on = threading.Event()
    make = Grammars._make

    def slow(self: Grammars, text: str) -> Grammar:
        assert goes_on.wait(60.0), "the loop stands still"
        return make(self, text)

    monkeypatch.setattr(Grammars, "_make", slow)
    wanted = SamplingParams(structured_outputs=StructuredOutputsParams(regex="q{3}"), max_tokens=9)

    async def main() -> str:
        engine = AsyncLLMEngine.from_llm(llm)
        asyncio.get_running_loop().call_later(0.01, goes_on.set)
        return [output.outputs[0].text async for output in engine.generate("hello", wanted, "a")][-1]

    assert asyncio.run(main()) == "qqq"


def test_a_grammar_that_tokens_cannot_follow_is_refused_at_once(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Grammars, text: str) -> Grammar:
        raise SamplingParamsError("structured_outputs: no")

    monkeypatch.setattr(Grammars, "_make", refuse)
    wanted = SamplingParams(structured_outputs=StructuredOutputsParams(regex="w{3}"))
    with pytest.raises(SamplingParamsError, match="structured_outputs: no"):
        LLMEngine.from_llm(llm).add_request("a", "hello", wanted)
