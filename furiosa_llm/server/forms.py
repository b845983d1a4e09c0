"""Fields that say what an answer has to look like: `response_format` and `structured_outputs`, and their schemas.

As in `fields`, what goes together stands in the schema alone: the handlers check it, with messages that say what to do.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from furiosa_llm.server.errors import ApiError
from furiosa_llm.server.fields import MAX_ENTRIES, Body

Schema = dict[str, Any]

_NULL: Schema = {"type": "null"}
_TEXT: Schema = {"type": "string", "minLength": 1}
_KINDS: dict[str, tuple[Schema, Schema]] = {
    "json": ({"anyOf": [{"type": "object"}, _TEXT]}, _NULL),
    "regex": (_TEXT, _NULL),
    "choice": (
        {"type": "array", "items": {**_TEXT, "maxLength": 4096}, "minItems": 1, "maxItems": MAX_ENTRIES},
        _NULL,
    ),
    "grammar": (_TEXT, _NULL),
    "json_object": ({"const": True}, {"enum": [None, False]}),
}
"""What each kind of constraint holds, and what it holds if it is not the one that is given."""

_BLANKS_OF_JSON: tuple[Schema, ...] = (
    {"disable_any_whitespace": {"const": False}, "whitespace_pattern": {"anyOf": [_TEXT, _NULL]}},
    {"disable_any_whitespace": {"const": True}, "whitespace_pattern": _NULL},
)
_NO_BLANKS: tuple[Schema, ...] = ({"disable_any_whitespace": {"const": False}, "whitespace_pattern": _NULL},)


def _object(properties: Schema, *required: str) -> Schema:
    return {"type": "object", "properties": properties, "required": list(required)}


def _become(schema: Schema, alternatives: list[Schema]) -> None:
    """Makes of an object's `schema` one that is exactly one of the `alternatives`."""
    for key in ("type", "properties", "required", "additionalProperties"):
        schema.pop(key, None)
    schema["oneOf"] = alternatives


def _one_format(schema: Schema) -> None:
    given, _ = schema["properties"]["json_schema"]["anyOf"]  # a reference, or null
    text = _object({"type": {"const": "text"}, "json_schema": _NULL}, "type")
    any_object = {"schema": {"anyOf": [{"type": "object"}, _NULL]}, "json_schema": _NULL}
    by_schema = _object({"type": {"const": "json_schema"}, "json_schema": given}, "type", "json_schema")
    _become(schema, [text, _object({"type": {"const": "json_object"}, **any_object}, "type"), by_schema])


def _one_kind(schema: Schema) -> None:
    alternatives = []
    for kind, (given, _) in _KINDS.items():
        others = {name: absent for name, (_, absent) in _KINDS.items() if name != kind}
        for blanks in _BLANKS_OF_JSON if kind.startswith("json") else _NO_BLANKS:
            required = [kind, "disable_any_whitespace"] if blanks["disable_any_whitespace"]["const"] else [kind]
            alternatives.append(_object({kind: given, **others, **blanks}, *required))
    _become(schema, alternatives)


class JsonSchemaFormat(Body):
    """A JSON schema. With `strict` all of it is kept to, else what can be; name and description have no effect."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """What the answer has to look like: text, any JSON object, or JSON by a schema (two ways of saying which)."""

    model_config = ConfigDict(json_schema_extra=_one_format)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")

    def wanted_schema(self) -> dict[str, Any] | None:
        """The schema of the answer; None for text. Raises an ApiError if it is missing."""
        if (self.type == "json_schema") != (self.json_schema is not None):
            message = "response_format: type 'json_schema' and the field json_schema go together"
            raise ApiError(400, message, param="response_format")
        if self.type == "text":
            return None
        given = self.schema_ if self.json_schema is None else self.json_schema.schema_
        return {"type": "object"} if given is None else given

    @property
    def strict(self) -> bool:
        """Whether all of the schema has to be kept to."""
        return self.json_schema is not None and self.json_schema.strict is True


class StructuredOutputs(Body):
    """What the answer has to look like, as `StructuredOutputsParams` has it."""

    model_config = ConfigDict(json_schema_extra=_one_kind)

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: Annotated[list[str], Field(fail_fast=True)] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    whitespace_pattern: str | None = None
