"""Grammars for calls take what the parsers read back as calls, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from llguidance import LLMatcher, LLTokenizer
from tokenizers import AddedToken

from furiosa_llm.runtime.tokens.grammar import Grammars
from furiosa_llm.runtime.tokens.structured_outputs import StructuredOutputsParams
from furiosa_llm.server.call_formats import CALL_FORMATS
from furiosa_llm.server.tool_grammar import CallableFunction, CallGrammar, CallWriting, can_be_text
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


def listed(trigger: str) -> Callable[[str, str], str]:
    return lambda name, arguments: f"{trigger}[{llama(name, arguments).replace('parameters', 'arguments')}]"


WRITE = {
    "hermes": hermes,
    "llama3_json": llama,
    "mistral": listed("[TOOL_CALLS]"),
    "granite": listed("<tool_call>"),
    "phi4": listed("functools"),
}
BETWEEN = {"hermes": "\n", "llama3_json": "; "}
BOTH = pytest.mark.parametrize("parser", list(BETWEEN))


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


@pytest.mark.parametrize("parser", list(WRITE))
def test_forced_calls(parser: str) -> None:
    write = WRITE[parser]
    one, other = write("rain", '{"days": 3}'), write('odd "näme"/', '{"x": [1]}')
    several, single = grammar(parser).forced(), grammar(parser, several=False).forced()
    two = one + BETWEEN[parser] + other if parser in BETWEEN else f"{one[:-1]}, {other[other.index('[{') + 1 :]}"
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


DESIRED: dict[str, object] = {
    "type": "object",
    "properties": {
        "text": {"type": "string"},
        "days": {"type": "integer", "minimum": 1},
        "unit": {"enum": ["mm", "inch"], "type": "string"},
        "more": {"anyOf": [{"$ref": "#/$defs/tags"}, {"type": "null"}]},
    },
    "$defs": {"tags": {"type": "array", "items": {"type": "string"}}},
    "required": ["text", "days"],
}
TAGGED = {
    "qwen3_coder": (
        "<tool_call>\n<function=rain>\n{}</function>\n</tool_call>", "<parameter={}>\n{}\n</parameter>\n", "\n", "",
    ),
    "glm45": (
        "<tool_call>rain\n{}</tool_call>", "<arg_key>{}</arg_key>\n<arg_value>{}</arg_value>\n", "\n", "",
    ),
    "minimax_m2": (
        '\n<invoke name="rain">\n{}</invoke>', '<parameter name="{}">{}</parameter>\n', "",
        "<minimax:tool_call>{}\n</minimax:tool_call>",
    ),
}  # fmt: skip


@pytest.mark.parametrize("parser", TAGGED)
def test_forced_calls_in_tags(parser: str) -> None:
    whole, one, between, around = TAGGED[parser]
    functions = [CallableFunction(name="rain", parameters=DESIRED)]
    syntax = CALL_FORMATS[parser].syntax
    assert syntax is not None
    assert syntax.can_write(functions)
    several, single = (
        CallGrammar(functions, CallWriting(syntax=syntax, tags=(), several=many)).forced() for many in (True, False)
    )

    def call(*arguments: tuple[str, str]) -> str:
        return whole.format("".join(one.format(*argument) for argument in arguments))

    def answer(*calls: str) -> str:
        return (around or "{}").format(between.join(calls))

    text = 'if a < b:\n  "é" </x>'
    first = call(("text", text), ("days", "3"), ("unit", "mm"), ("more", '["a"]'))
    second = call(("text", ""), ("days", "12"))
    assert takes(answer(first), single)
    assert takes(answer(first, second), several)
    assert not takes(answer(first, second), single)
    for wrong in (
        call(("days", "3")),
        call(("text", "x"), ("days", "0")),
        call(("text", "x"), ("days", "3"), ("unit", "km")),
        call(("text", "x"), ("days", "3"), ("more", '"a"')),
        call(("text", "x"), ("days", "3"), ("other", "1")),
    ):
        assert not takes(answer(wrong), several)
    for size in (1, 1000):
        finder, written = ToolFinder(CALL_FORMATS[parser], {"rain": DESIRED}, streams=True), answer(first, second)
        found = finder.push("")
        for at in range(0, len(written), size):
            found.add(finder.push(written[at : at + size]))
        found.add(finder.flush())
        assert [json.loads(made.function.arguments) for made in whole_calls(found.calls)] == [
            {"text": text, "days": 3, "unit": "mm", "more": ["a"]},
            {"text": "", "days": 12},
        ]


@pytest.mark.parametrize(
    ("schema", "is_written"),
    [
        ({"type": "object", "properties": {}}, True),
        ({"type": "object", "additionalProperties": False}, True),
        ({"type": "object"}, False),
        ({"type": "object", "properties": {"x": {"type": "string", "pattern": "a+"}}}, False),
        ({"type": "object", "properties": {"x": {"type": "string", "maxLength": 3}}}, False),
        ({"type": "object", "properties": {"x": {"type": "array", "maxItems": 3}}}, True),
        ({"type": "object", "properties": {"x": {"type": "string", "enum": ["a\n"]}}}, False),
        ({"type": "object", "properties": {"x": {"type": "string", "const": "</arg_value>"}}}, False),
        ({"type": "object", "properties": {"x": {"type": "string", "const": "a"}}}, True),
        ({"type": "object", "properties": {"x": {}}}, False),
        ({"type": "object", "properties": {"x": {"$ref": "#/$defs/y"}}, "$defs": {"y": {"type": "string"}}}, False),
        ({"type": "object", "properties": {"<x>": {"type": "integer"}}}, False),
        ({"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["y"]}, False),
        ({"type": "object", "properties": {"x": {"type": "integer"}}, "minProperties": 1}, False),
    ],
)
def test_what_is_kept_to_in_tags(schema: dict[str, object], is_written: bool) -> None:
    assert can_be_text(schema) is is_written
    syntax = CALL_FORMATS["glm45"].syntax
    assert syntax is not None
    assert not syntax.can_write([CallableFunction(name="a b", parameters={"type": "object", "properties": {}})])


SECTIONS = {
    "kimi_k2": (
        "<|tool_calls_section_begin|>{}<|tool_calls_section_end|>", "",
        "<|tool_call_begin|>functions.rain:0<|tool_call_argument_begin|>{}<|tool_call_end|>",
    ),
    "deepseek_v3": (
        "<｜tool▁calls▁begin｜>{}<｜tool▁calls▁end｜>", "\n",
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>rain\n```json\n{}\n```<｜tool▁call▁end｜>",
    ),
    "deepseek_v31": (
        "<｜tool▁calls▁begin｜>{}<｜tool▁calls▁end｜>", "",
        "<｜tool▁call▁begin｜>rain<｜tool▁sep｜>{}<｜tool▁call▁end｜>",
    ),
}  # fmt: skip


@pytest.mark.parametrize("parser", SECTIONS)
def test_forced_calls_in_sections(parser: str) -> None:
    around, between, one = SECTIONS[parser]
    syntax = CALL_FORMATS[parser].syntax
    assert syntax is not None
    made = CallGrammar(FUNCTIONS[:1], CallWriting(syntax=syntax, tags=(), several=True))
    single = CallGrammar(FUNCTIONS[:1], CallWriting(syntax=syntax, tags=(), several=False)).forced()
    good, bad = one.format('{"days": 3}'), one.format('{"days": 0}')
    two = around.format(good + between + good)
    assert takes(two, made.forced())
    assert takes(around.format(good), single)
    assert not takes(two, single)
    for wrong in (bad, ""):
        assert not takes(around.format(wrong), made.forced())
    assert takes(f"Well: {two} Done", made.or_text())
    assert not takes(f"Well: {around.format(bad)}", made.or_text())
    found = ToolFinder(CALL_FORMATS[parser], ["rain"]).push(two)
    assert [json.loads(call.function.arguments) for call in whole_calls(found.calls)] == [{"days": 3}] * 2


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


HERMES_PARTS = ("<tool_call>", '\n{"name": "rain", "arguments": {"days": 3}}\n', "</tool_call>")
GLM_PARTS = (
    "<tool_call>",
    "rain\n",
    "<arg_key>",
    "text",
    "</arg_key>",
    "\n<arg_value>a < b",
    "</arg_value>",
    "\n",
    "</tool_call>",
)
DEEPSEEK_PARTS = (
    *(
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁call▁begin｜>",
        "rain",
        "<｜tool▁sep｜>",
        '{"days": 3}',
        "<｜tool▁call▁end｜>",
    ),
    "<｜tool▁calls▁end｜>",
)
TEXT_ONLY = [CallableFunction(name="rain", parameters={"type": "object", "properties": {"text": {"type": "string"}}})]


@pytest.mark.parametrize(
    ("parser", "mode", "functions", "parts"),
    [
        ("hermes", "forced", FUNCTIONS[:1], HERMES_PARTS),
        ("hermes", "or_text", FUNCTIONS[:1], HERMES_PARTS),
        ("glm45", "forced", TEXT_ONLY, GLM_PARTS),
        ("deepseek_v31", "forced", FUNCTIONS[:1], DEEPSEEK_PARTS),
        ("deepseek_v31", "or_text", FUNCTIONS[:1], DEEPSEEK_PARTS),
    ],
)
def test_tags_that_are_tokens_are_written_as_tokens(
    parser: str, mode: str, functions: list[CallableFunction], parts: tuple[str, ...]
) -> None:
    plain = tokenizer_kinds.byte_level()
    wider = plain._tokenizer
    tags = {part for part in parts if part.startswith("<")}
    wider.add_tokens([AddedToken(tag, special=False) for tag in sorted(tags)])
    assert plain.tags == {"<tool>", *tags}
    syntax = CALL_FORMATS[parser].syntax
    assert syntax is not None
    writing = CallWriting(syntax=syntax, tags=plain.tags, several=False)
    text = getattr(CallGrammar(functions, writing), mode)()
    constraint = Grammars(plain).compile(StructuredOutputsParams(grammar=text).llguidance_grammar).start([])
    letters = tokenizer_kinds._byte_letters()
    for part in parts:
        names = [part] if part in plain.tags else [letters[byte] for byte in part.encode()]
        for name in names:
            token = wider.token_to_id(name)
            assert token is not None
            assert constraint._allowed()[token] or part not in plain.tags
            constraint.record(token)
    assert not constraint._has_failed()
    assert constraint._matcher.is_accepting()
