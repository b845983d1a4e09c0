"""Grammars for calls take what the parsers read back as calls, and nothing else."""

from __future__ import annotations

import json

import pytest
from llguidance import LLMatcher, LLTokenizer
from tokenizers import AddedToken

from furiosa_llm.runtime.tokens.grammar import Grammars
from furiosa_llm.runtime.tokens.structured_outputs import StructuredOutputsParams
from furiosa_llm.server.call_formats import CALL_FORMATS
from furiosa_llm.server.tool_grammar import CallableFunction, CallGrammar, CallWriting
from furiosa_llm.server.tools import ToolFinder, whole_calls
from tests.support.runtime import tokenizer_kinds

DAYS = {
    "type": "object",
    "$defs": {"days": {"type": "integer", "minimum": 1}},
    "properties": {"days": {"$ref": "#/$defs/days"}},
    "required": ["days"],
    "additionalProperties": False,
}
FUNCTIONS = [
    CallableFunction(name="rain", parameters=DAYS),
    CallableFunction(name='odd "näme"/', parameters={"type": "object"}),
]


def hermes(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": {arguments}}}\n</tool_call>'


def llama(name: str, arguments: str) -> str:
    return f'{{"name": {json.dumps(name, ensure_ascii=False)}, "parameters": {arguments}}}'


WRITE = {"hermes": hermes, "llama3_json": llama}
BETWEEN = {"hermes": "\n", "llama3_json": "; "}
BOTH = pytest.mark.parametrize("parser", list(WRITE))


def grammar(parser: str, *, several: bool = True) -> CallGrammar:
    syntax = CALL_FORMATS[parser].syntax
    assert syntax is not None
    return CallGrammar(FUNCTIONS, CallWriting(syntax=syntax, tags=(), several=several))


def takes(text: str, grammar_text: str) -> bool:
    """Whether `text` is one that the grammar describes."""
    made = StructuredOutputsParams(grammar=grammar_text)
    matcher = LLMatcher(LLTokenizer("byte"), made.llguidance_grammar, log_level=0)
    written = list(text.encode())
    return matcher.try_consume_tokens(written) == len(written) and matcher.is_accepting()


@BOTH
def test_forced_calls(parser: str) -> None:
    write = WRITE[parser]
    one, other = write("rain", '{"days": 3}'), write('odd "näme"/', '{"x": [1]}')
    several, single = grammar(parser).forced(), grammar(parser, several=False).forced()
    two = one + BETWEEN[parser] + other
    for text in (one, other):
        assert takes(text, several)
        assert takes(text, single)
    assert takes(two, several)
    assert not takes(two, single)
    for text in ("", "text", f"{one}!", write("rain", '{"days": 0}'), write("rain", "{}"), write("snow", "{}")):
        assert not takes(text, several)
    finder = ToolFinder(CALL_FORMATS[parser], [function.name for function in FUNCTIONS])
    found = finder.push(two)
    found.add(finder.flush())
    calls = [(call.function.name, json.loads(call.function.arguments)) for call in whole_calls(found.calls)]
    assert calls == [("rain", {"days": 3}), ('odd "näme"/', {"x": [1]})]
    assert found.content == ""


def test_calls_or_json() -> None:
    either = grammar("hermes").or_json({"const": {"a": 1}})
    assert takes('{"a": 1}', either)
    assert takes(hermes("rain", '{"days": 3}'), either)
    for text in ("text", '{"a": 2}', hermes("rain", '{"days": "3"}')):
        assert not takes(text, either)


@BOTH
def test_calls_or_text(parser: str) -> None:
    write, either = WRITE[parser], grammar(parser).or_text()
    good, bad = write("rain", '{"days": 3}'), write("rain", '{"days": "3"}')
    for text in ("", "text", "a < b <tool", " <br>\n", good, good + BETWEEN[parser] + good):
        assert takes(text, either)
    assert not takes(bad, either)


def test_text_around_calls() -> None:
    either, one = grammar("hermes").or_text(), grammar("hermes", several=False).or_text()
    good, bad = hermes("rain", '{"days": 3}'), hermes("rain", '{"days": "3"}')
    assert takes(f"Well: {good} and {good}.", either)
    assert takes(f"Well: {good}.", one)
    assert not takes(f"Well: {bad}.", either)
    assert not takes(f"Well: {good} and {bad}", either)
    assert not takes(f"Well: {bad}.", one)


def test_a_tag_that_tries_to_look_like_text() -> None:
    assert not takes('<|python_tag|>{"name": "rain", "parameters": {}}', grammar("llama3_json").or_text())
    assert not takes(' {"name": "rain", "parameters": {}}', grammar("llama3_json").or_text())


@pytest.mark.parametrize("mode", ["forced", "or_text"])
def test_tags_that_are_tokens_are_written_as_tokens(mode: str) -> None:
    plain = tokenizer_kinds.byte_level()
    wider = plain._tokenizer
    wider.add_tokens([AddedToken("<tool_call>", special=False), AddedToken("</tool_call>", special=False)])
    assert plain.tags == {"<tool>", "<tool_call>", "</tool_call>"}
    syntax = CALL_FORMATS["hermes"].syntax
    assert syntax is not None
    writing = CallWriting(syntax=syntax, tags=plain.tags, several=False)
    text = getattr(CallGrammar(FUNCTIONS[:1], writing), mode)()
    constraint = Grammars(plain).compile(StructuredOutputsParams(grammar=text).llguidance_grammar).start([])
    letters = tokenizer_kinds._byte_letters()
    for part in ("<tool_call>", '\n{"name": "rain", "arguments": {"days": 3}}\n', "</tool_call>"):
        names = [part] if part in plain.tags else [letters[byte] for byte in part.encode()]
        for name in names:
            token = wider.token_to_id(name)
            assert token is not None
            assert constraint._allowed()[token] or part not in plain.tags
            constraint.record(token)
    assert not constraint._has_failed()
    assert constraint._matcher.is_accepting()
