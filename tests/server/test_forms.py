"""What the document says of the forms of answers is what the server takes."""

from __future__ import annotations

from typing import Any

import jsonschema_rs
import pytest
from pydantic import ValidationError

from furiosa_llm.runtime.errors import SamplingParamsError
from furiosa_llm.runtime.tokens.structured_outputs import StructuredOutputsParams
from furiosa_llm.server.errors import ApiError
from furiosa_llm.server.fields import Body
from furiosa_llm.server.forms import ResponseFormat, StructuredOutputs

NAMED = {"name": "x"}


def keeps_to_the_document(form: type[Body], given: Any) -> bool:
    return bool(jsonschema_rs.is_valid(form.model_json_schema(), given))


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ({"type": "text"}, True),
        ({"type": "text", "json_schema": None}, True),
        ({"type": "text", "json_schema": NAMED}, False),
        ({"type": "json_object"}, True),
        ({"type": "json_object", "json_schema": NAMED}, False),
        ({"type": "json_schema"}, False),
        ({"type": "json_schema", "json_schema": None}, False),
        ({"type": "json_schema", "json_schema": {}}, True),
        ({"type": "json_schema", "json_schema": {**NAMED, "more": 1}}, True),
        ({"type": "json_schema", "json_schema": {**NAMED, "schema": 1}}, False),
        ({"type": "json_schema", "json_schema": NAMED}, True),
        ({"type": "json_schema", "json_schema": {**NAMED, "schema": {}, "strict": None}}, True),
        ({"type": "json_schema", "json_schema": NAMED, "more": 1}, True),
        ({"type": "json_object", "schema": {"type": "object"}}, True),
        ({"type": "json_object", "schema": 1}, False),
        ({"type": "xml"}, False),
        ({}, False),
    ],
)
def test_formats(given: Any, taken: bool) -> None:
    assert keeps_to_the_document(ResponseFormat, given) is taken
    try:
        ResponseFormat.model_validate(given).wanted_schema()
    except (ValidationError, ApiError):
        assert not taken
    else:
        assert taken


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ({}, False),
        ({"json_object": False}, False),
        ({"regex": None, "json_object": None}, False),
        ({"json": {}}, True),
        ({"json": "{}", "regex": None, "json_object": False}, True),
        ({"json": ""}, False),
        ({"json": ["a"]}, False),
        ({"json": {}, "regex": "a"}, False),
        ({"json": {}, "json_object": True}, False),
        ({"json": {}, "disable_any_whitespace": True}, True),
        ({"json": {}, "disable_any_whitespace": False, "whitespace_pattern": " "}, True),
        ({"json": {}, "disable_any_whitespace": True, "whitespace_pattern": " "}, False),
        ({"json": {}, "disable_any_whitespace": True, "whitespace_pattern": None}, True),
        ({"json": {}, "whitespace_pattern": ""}, False),
        ({"json_object": True, "whitespace_pattern": " "}, True),
        ({"regex": "a"}, True),
        ({"regex": ""}, False),
        ({"regex": "a", "json_object": False}, True),
        ({"regex": "a", "disable_any_whitespace": False, "whitespace_pattern": None}, True),
        ({"regex": "a", "disable_any_whitespace": True}, False),
        ({"regex": "a", "whitespace_pattern": " "}, False),
        ({"choice": ["a"]}, True),
        ({"choice": ["a", "b"], "grammar": "start: /a/"}, False),
        ({"choice": []}, False),
        ({"choice": [""]}, False),
        ({"choice": ["a" * 4096]}, True),
        ({"choice": ["a" * 4097]}, False),
        ({"choice": ["a"] * 1024}, True),
        ({"choice": ["a"] * 1025}, False),
        ({"grammar": "start: /a/"}, True),
        ({"grammar": ""}, False),
        ({"regex": "a", "more": 1}, True),
    ],
)
def test_structured_outputs(given: Any, taken: bool) -> None:
    assert keeps_to_the_document(StructuredOutputs, given) is taken
    try:
        StructuredOutputsParams(**StructuredOutputs.model_validate(given).model_dump(by_alias=True))
    except (ValidationError, SamplingParamsError):
        assert not taken
    else:
        assert taken
