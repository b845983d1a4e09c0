"""Calls of tools are found however the text is cut, and what is none stays text."""

from __future__ import annotations

import json

import pytest

from furiosa_llm.runtime.errors import InputError
from furiosa_llm.server.tools import TOOL_PARSERS, tool_parser

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


@pytest.mark.parametrize(("name", "text", "content", "calls"), CASES)
@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_calls(name: str, text: str, content: str | None, calls: list[tuple[str, object]], size: int) -> None:
    finder = TOOL_PARSERS[name](["f", "g"])
    found = [finder.push(text[at : at + size]) for at in range(0, len(text), size)]
    found.append(finder.flush())
    assert "".join(one.content for one in found) == (text if content is None else content)
    made = [call.function for one in found for call in one.calls]
    assert [(call.name, json.loads(call.arguments)) for call in made] == calls


def test_text_is_not_held_back_longer_than_needed() -> None:
    finder = TOOL_PARSERS["hermes"](["f"])
    assert [finder.push(piece).content for piece in ("a <", "b", " <tool", "_box>")] == ["a ", "<b", " ", "<tool_box>"]
    assert TOOL_PARSERS["llama3_json"](["f"]).push("Hi").content == "Hi"


def test_deep_nesting_is_text() -> None:
    text = "<tool_call>" + "[" * 100_000 + "</tool_call>"
    finder = TOOL_PARSERS["hermes"](["f"])
    assert finder.push(text).content == text


@pytest.mark.parametrize("name", TOOL_PARSERS)
def test_arguments_can_be_sent_whatever_they_hold(name: str) -> None:
    written = r'{"x": "\ud800", "y": "ü"}'
    finder = TOOL_PARSERS[name](["f"])
    finder.push(f'{finder.syntax.trigger}{{"name": "f", "arguments": {written}}}')
    [call] = finder.flush().calls
    assert json.loads(call.function.arguments.encode()) == {"x": "\ud800", "y": "ü"}


def test_an_unknown_parser() -> None:
    assert tool_parser(None) is None
    with pytest.raises(InputError, match="tool_call_parser='pythonic' is unknown; give one of hermes, llama3_json"):
        tool_parser("pythonic")
