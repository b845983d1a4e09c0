"""Calls of tools are found however the text is cut, and what is none stays text."""

# ruff: noqa: E501 - formats are easier to read uncut

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from furiosa_llm.runtime.errors import InputError
from furiosa_llm.server.call_formats import CALL_FORMATS, REASONING_FORMATS
from furiosa_llm.server.reasoning import ReasoningFinder, reasoning_format
from furiosa_llm.server.settings import REASONING_PARSERS, TOOL_CALL_PARSERS
from furiosa_llm.server.tools import Found, ToolFinder, call_format, whole_calls

HERMES = [
    ("plain text, 1 < 2 <tool", "plain text, 1 < 2 <tool", []),
    ('<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>', "", [("f", {"x": 1})]),
    (
        'Well.\n<tool_call>{"name": "f", "arguments": {}}</tool_call>\n<tool_call>{"name": "g"}</tool_call>\nDone',
        "Well.\nDone",
        [("f", {}), ("g", {})],
    ),
    ('<tool_call>{"name": "f", "arguments": {"ü": "<"}}', "", [("f", {"ü": "<"})]),
    ('<tool_call>{"name": "f"', '<tool_call>{"name": "f"', []),
    ("<tool_call>[1]</tool_call>", "<tool_call>[1]</tool_call>", []),
    ('<tool_call>{"name": "h"}</tool_call>', '<tool_call>{"name": "h"}</tool_call>', []),
    ('<tool_call>{"name": "f", "arguments": "x"}</tool_call>', None, []),
    ("<<tool_call>", "<<tool_call>", []),
    ('<tool_call>{"name": ["f"]}</tool_call>', None, []),
    ('<tool_call>{"name": {"f": 1}, "arguments": {}}</tool_call>', None, []),
    ('<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>', None, []),
    ('<tool_call>{"name": "f", "arguments": {"x": -1e999}}</tool_call>', None, []),
]
LLAMA3_JSON = [
    ("plain text", "plain text", []),
    ('{"name": "f", "parameters": {"x": 1}}', "", [("f", {"x": 1})]),
    (' <|python_tag|>{"name": "f", "parameters": {}}; {"name": "g", "arguments": {}}', "", [("f", {}), ("g", {})]),
    ('{"name": "f", "parameters": {}} and more', None, []),
    ('{"name": "f", "parameters": {}}; {"name": "Bob"}', None, []),
    ('{"answer": 42}', None, []),
    ('{"name": []}', None, []),
    ('{"name": "f", "parameters": {"x": Infinity}}', None, []),
    ('Use {"name": "f"}', None, []),
    ("<|pyth", None, []),
    ("", "", []),
]
CASES = [("hermes", *case) for case in HERMES] + [("llama3_json", *case) for case in LLAMA3_JSON]


def read(name: str, text: str, size: int, *, streams: bool = False) -> Found:
    schema = {"properties": {"x": {"type": "integer"}, "y": {"anyOf": [{"type": "array"}, {"type": "null"}]}}}
    finder = ToolFinder(CALL_FORMATS[name], {"f": schema, "g": {}}, streams=streams)
    found = Found()
    for at in range(0, len(text), size):
        found.add(finder.push(text[at : at + size]))
    found.add(finder.flush())
    return found


@pytest.mark.parametrize(("name", "text", "content", "calls"), CASES)
@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_calls(name: str, text: str, content: str | None, calls: list[tuple[str, object]], size: int) -> None:
    found = read(name, text, size)
    assert found.content == (text if content is None else content)
    made = [call.function for call in whole_calls(found.calls)]
    assert [(call.name, json.loads(call.arguments)) for call in made] == calls


def test_text_is_not_held_back_longer_than_needed() -> None:
    finder = ToolFinder(CALL_FORMATS["hermes"], ["f"])
    assert [finder.push(piece).content for piece in ("a <", "b", " <tool", "_box>")] == ["a ", "<b", " ", "<tool_box>"]
    assert ToolFinder(CALL_FORMATS["llama3_json"], ["f"]).push("Hi").content == "Hi"


def test_deep_nesting_is_text() -> None:
    text = "<tool_call>" + "[" * 100_000 + "</tool_call>"
    finder = ToolFinder(CALL_FORMATS["hermes"], ["f"])
    assert finder.push(text).content == text


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("name", ["hermes", "llama3_json"])
def test_arguments_can_be_sent_whatever_they_hold(name: str, streams: bool) -> None:
    form = CALL_FORMATS[name]
    assert form.syntax is not None
    written = r'{"x": "\ud800", "y": "ü"}'
    found = read(name, f'{form.syntax.trigger}{{"name": "f", "arguments": {written}}}', 9, streams=streams)
    [call] = whole_calls(found.calls)
    assert json.loads(call.function.arguments.encode()) == {"x": "\ud800", "y": "ü"}


F: tuple[str, dict[str, Any]] = ("f", {"x": 1, "y": ["a", {"b": "}"}]})
G: tuple[str, dict[str, Any]] = ("g", {})
ARGUMENTS = json.dumps(F[1])
KIMI = "<|tool_call_begin|>functions.{}:{}<|tool_call_argument_begin|>{}<|tool_call_end|>"
DEEPSEEK = "<｜tool▁call▁begin｜>{}<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
FENCED = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{}\n```json\n{}\n```<｜tool▁call▁end｜>"
GLM = "<tool_call>f\n<arg_key>x</arg_key>\n<arg_value>1</arg_value>\n<arg_key>y</arg_key>\n<arg_value>{}</arg_value>\n</tool_call>"
QWEN = "<tool_call>\n<function=f>\n<parameter=x>\n1\n</parameter>\n<parameter=y>\n{}\n</parameter>\n</function>\n</tool_call>"
INVOKE = '<invoke name="f">\n<parameter name="x">1</parameter>\n<parameter name="y">{}</parameter>\n</invoke>\n<invoke name="g">\n</invoke>\n'
Y = json.dumps(F[1]["y"])
PUBLISHED = {
    "hermes": f'<tool_call>\n{{"name": "f", "arguments": {ARGUMENTS}}}\n</tool_call>\n<tool_call>\n{{"name": "g", "arguments": {{}}}}\n</tool_call>',
    "llama3_json": f'{{"name": "f", "parameters": {ARGUMENTS}}}; {{"name": "g", "parameters": {{}}}}',
    "pythonic": f"[f(x=1, y={F[1]['y']!r}), g()]",
    "mistral": f'[TOOL_CALLS][{{"name": "f", "arguments": {ARGUMENTS}, "id": "abc123456"}}, {{"name": "g", "arguments": {{}}}}]',
    "granite": f'<|tool_call|>[{{"arguments": {ARGUMENTS}, "name": "f"}}, {{"name": "g", "arguments": {{}}}}]',
    "phi4": f'functools[{{"name": "f", "arguments": {ARGUMENTS}}}, {{"name": "g", "arguments": {{}}}}]',
    "qwen3_coder": QWEN.format(Y) + "\n<tool_call>\n<function=g>\n</function>\n</tool_call>",
    "glm45": GLM.format(Y) + "\n<tool_call>g\n</tool_call>",
    "minimax_m2": f"<minimax:tool_call>\n{INVOKE.format(Y)}</minimax:tool_call>",
    "kimi_k2": f"<|tool_calls_section_begin|>{KIMI.format('f', 0, ARGUMENTS)}{KIMI.format('g', 1, '{}')}<|tool_calls_section_end|>",
    "deepseek_v3": f"<｜tool▁calls▁begin｜>{FENCED.format('f', ARGUMENTS)}\n{FENCED.format('g', '{}')}<｜tool▁calls▁end｜>",
    "deepseek_v31": f"<｜tool▁calls▁begin｜>{DEEPSEEK.format('f', ARGUMENTS)}{DEEPSEEK.format('g', '{}')}<｜tool▁calls▁end｜>",
}


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("name", CALL_FORMATS)
def test_published_formats(name: str, streams: bool, size: int) -> None:
    found = read(name, PUBLISHED[name], size, streams=streams)
    calls = [call.function for call in whole_calls(found.calls)]
    assert [(call.name, json.loads(call.arguments)) for call in calls] == [F, G]
    assert not found.content.strip()


@pytest.mark.parametrize("name", [name for name in CALL_FORMATS if name not in ("pythonic", "granite")])
def test_a_call_is_told_as_soon_as_its_name_is_known(name: str) -> None:
    text = PUBLISHED[name]
    finder = ToolFinder(CALL_FORMATS[name], ["f", "g"], streams=True)
    begin = re.search(
        r"(\"name\": \"f\", \"(arguments|parameters)\": \{|function=f>|f\n<arg_key>|name=\"f\">|f\n```json\n\{|f<｜tool▁sep｜>\{|n\|>\{)",
        text,
    )
    assert begin is not None
    found = finder.push(text[: begin.end()])
    assert [piece.name for piece in found.calls if piece.id is not None] == ["f"]
    assert len([piece for at in range(begin.end(), len(text)) for piece in finder.push(text[at]).calls]) > 3


@pytest.mark.parametrize("name", ["hermes", "mistral", "qwen3_coder", "kimi_k2"])
def test_what_is_cut_in_the_middle_of_a_call_is_told_as_far_as_it_went(name: str) -> None:
    text = PUBLISHED[name][: PUBLISHED[name].index("}") - 3] if name != "qwen3_coder" else PUBLISHED[name][:70]
    streamed, whole = read(name, text, 2, streams=True), read(name, text, 2)
    assert [piece.name for piece in streamed.calls if piece.id] == ["f"]
    assert streamed.content == ""
    assert (whole.content, whole.calls) == (text, [])


def test_text_behind_a_call_that_was_told() -> None:
    found = read("llama3_json", '{"name": "f", "parameters": {}} and more', 5, streams=True)
    assert [call.function.name for call in whole_calls(found.calls)] == ["f"]
    assert found.content == "and more"


@pytest.mark.parametrize(
    ("name", "prompt", "text", "thought", "said"),
    [
        ("qwen3", "x", "<think>\na < b\n</think>\n\nYes <b>", "\na < b\n", "Yes <b>"),
        ("qwen3", "x", "No thought", "", "No thought"),
        ("qwen3", "x<think>\n", "a</think>b", "a", "b"),
        ("qwen3", "<think>\n\n</think>\n\n", "<b> is bold", "", "<b> is bold"),
        ("deepseek_r1", "x", "never ends </thin", "never ends </thin", ""),
        ("deepseek_r1", "x", "<think>a</think>b", "a", "b"),
        ("mistral", "x", "[THINK]a[/THINK]b", "a", "b"),
        ("granite", "x", "Here is my thought process: a Here is my response: b", " a ", " b"),
    ],
)
@pytest.mark.parametrize("size", [1, 4, 1000])
def test_thoughts(name: str, prompt: str, text: str, thought: str, said: str, size: int) -> None:
    finder = ReasoningFinder(REASONING_FORMATS[name], prompt)
    found = [finder.push(text[at : at + size]) for at in range(0, len(text), size)] + [finder.flush()]
    assert "".join(one for one, _ in found) == thought
    assert "".join(one for _, one in found).lstrip("\n") == said


def test_names_of_parsers() -> None:
    assert tuple(CALL_FORMATS) == TOOL_CALL_PARSERS
    assert tuple(REASONING_FORMATS) == REASONING_PARSERS
    assert (call_format(None), reasoning_format(None)) == (None, None)
    with pytest.raises(InputError, match="tool_call_parser='xml' is unknown; give one of hermes, llama3_json"):
        call_format("xml")
    with pytest.raises(InputError, match="reasoning_parser='xml' is unknown; give one of qwen3, glm45"):
        reasoning_format("xml")
