"""Schemas as clients send them: what the library can enforce of them is enforced, and numbers end."""

from __future__ import annotations

import json
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from furiosa_llm.runtime.tokens.json_schema import bounded, eased
from furiosa_llm.runtime.tokens.structured_outputs import StructuredOutputsParams

BYTES = LLTokenizer("byte")
TEXT = {"type": "string"}


def follows(wanted: StructuredOutputsParams, text: str) -> bool:
    """Whether `text` is a whole answer."""
    matcher = LLMatcher(BYTES, wanted.llguidance_grammar, log_level=0)
    return matcher.try_consume_tokens(list(text.encode())) == len(text.encode()) and matcher.is_accepting()


@pytest.mark.parametrize(
    ("schema", "dropped", "yes", "no"),
    [
        ({"type": "array", "items": TEXT, "uniqueItems": True}, ["uniqueItems"], ["a", "a"], [1]),
        ({"type": "object", "propertyNames": {"pattern": "^a"}}, ["propertyNames"], {"b": 1}, []),
        ({"type": "object", "properties": {"a": TEXT}, "not": {"required": ["a"]}}, ["not"], {"a": "x"}, {"a": 1}),
        ({"type": "string", "pattern": "^(?=a)b", "maxLength": 2}, ["pattern"], "xy", "xyz"),
        ({"type": "string", "pattern": "^(?!x).", "format": "date"}, ["pattern"], "2020-01-01", "x"),
        ({"type": "string", "format": "frob"}, ["frob"], "x", 1),
        ({"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}, ["minimum", "maximum"], 12, 1.5),
        ({"type": "integer", "format": "int64", "minimum": 0}, [], 3, -3),
        ({"oneOf": [{"type": "object"}, {"type": "object", "properties": {"a": TEXT}}]}, ["oneOf"], {"a": "x"}, 1),
        ({"properties": {"a": {"$ref": "https://example.com/x"}}, "type": "object"}, ["$ref"], {"a": 1}, []),
        ({"properties": {"a": {"$ref": "#/$defs/no"}}, "$defs": {}, "type": "object"}, ["$ref"], {"a": 1}, []),
        ({"type": "object", "patternProperties": {"^(?!x)": TEXT}}, ["patternProperties"], {"a": 1}, []),
        ({"type": "object", "properties": {"a": {"type": "any"}}}, ["type"], {"a": 1}, []),
        ({"type": "array", "minItems": 2, "maxItems": 1}, ["the whole schema"], [], {}),
        ({"items": {"$ref": "#/$defs/a~1b/anyOf/0"}, "$defs": {"a/b": {"anyOf": [TEXT]}}}, [], ["x"], [1]),
    ],
)  # fmt: skip
def test_what_can_be_enforced_is(schema: dict[str, Any], dropped: list[str], yes: Any, no: Any) -> None:
    before = json.dumps(schema)
    found, words = eased(schema)
    assert json.dumps(schema) == before
    assert len(words) == len(dropped)
    assert all(name in word for name, word in zip(dropped, words, strict=True))
    wanted = StructuredOutputsParams(json=found)
    assert follows(wanted, json.dumps(yes))
    assert not follows(wanted, json.dumps(no))


@pytest.mark.parametrize(
    ("schema", "ends"),
    [
        ({"type": "integer"}, True),
        ({"type": "number"}, True),
        ({"type": ["number", "null"], "minimum": 0}, True),
        ({"type": "object", "properties": {"a": {"anyOf": [{"type": "number"}]}}, "required": ["a"]}, True),
        ({"type": "array", "items": {"type": "integer", "exclusiveMaximum": 10}}, True),
        ({"type": "number", "multipleOf": 0.5}, True),
        ({}, False),
    ],
)
def test_numbers_have_an_end(schema: dict[str, Any], ends: bool) -> None:
    begin = '{"a": ' if "properties" in schema else "[" if "items" in schema else ""
    for digits in ("1" * 100, "0." + "5" * 100, "-" + "1" * 100):
        matcher = LLMatcher(BYTES, StructuredOutputsParams(json=schema).llguidance_grammar, log_level=0)
        taken = matcher.try_consume_tokens(list((begin + digits).encode()))
        assert (taken < len(begin) + 40) is ends


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "enum": [10**20]},
        {"allOf": [{"type": "integer"}], "minimum": 10**19},
        {"type": "number", "minimum": 1e-12, "maximum": 1e-11},
        {"type": "integer", "minimum": 10**18},
        {"type": "string"},
    ],
)
def test_bounds_never_exclude_what_a_schema_asks_for(schema: dict[str, Any]) -> None:
    found = bounded(schema)
    assert "multipleOf" not in found
    assert {name: found[name] for name in schema} == schema
    assert found.get("maximum", 10**99) >= schema.get("minimum", 0)


@pytest.mark.parametrize(
    ("grammar", "yes", "no"),
    [
        ('root ::= "\\u00e9"', "é", "e"),
        ('root ::= [\\u00e0-\\u00ff] "\\u0041\\U0001F600"', "éA😀", "eA"),
        ('root ::= "\\\\u00e9"', "\\u00e9", "é"),
        ('?start: "x" | "y"', "y", "z"),
        ('start: a\n?a: "x"', "x", "y"),
    ],
)
def test_notations_of_grammars(grammar: str, yes: str, no: str) -> None:
    wanted = StructuredOutputsParams(grammar=grammar)
    assert follows(wanted, yes)
    assert not follows(wanted, no)
