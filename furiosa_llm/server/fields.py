"""Types of the fields of requests that say in the schema which values are taken.

The ranges stand in the schema alone: `SamplingParams` and the handlers check them, with messages that name the value.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    GetJsonSchemaHandler,
    Tag,
    model_validator,
)

MAX_ENTRIES = 1024
"""Of a list of words or tokens; what `SamplingParams` takes."""

_GREATEST = 2**53 - 1
"""The greatest integer that every reader of JSON reads as itself."""


class Body(BaseModel):
    """A request's body, or an object in it: its fields have the types that it names.

    Clients differ in what they add to that: fields that it does not name, and nulls, count as left out.
    """

    model_config = ConfigDict(extra="ignore", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        if isinstance(value, dict) and any(one is None for one in value.values()):
            return {name: one for name, one in value.items() if one is not None}
        return value

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """The schema, in which null is taken by all fields that may be left out."""
        made = handler(core_schema)
        schema = handler.resolve_ref_schema(made)
        for name, field in schema.get("properties", {}).items():
            if name not in schema.get("required", ()):
                schema["properties"][name] = _or_null(field)
        return made


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    if schema.get("type") == "null" or _NULL in schema.get("anyOf", ()):
        return schema
    about: dict[str, Any] = {key: schema[key] for key in ("title", "description", "default") if key in schema}
    return {"anyOf": [{key: one for key, one in schema.items() if key not in about}, _NULL], **about}


_NULL = {"type": "null"}


def _whole(value: object) -> object:
    """1.0 as 1: JSON and its schemas have one kind of numbers."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _all_whole(value: object) -> object:
    # One look at the types first: a prompt may be long, and none of its tokens is likely to be a float.
    return [_whole(one) for one in value] if isinstance(value, list) and float in set(map(type, value)) else value


_WHOLE = BeforeValidator(_whole)
_ALL_WHOLE = BeforeValidator(_all_whole)

TokenId = Annotated[int, Field(json_schema_extra={"minimum": 0, "maximum": _GREATEST})]
TokenIds = Annotated[list[TokenId], Field(json_schema_extra={"minItems": 1}), Field(fail_fast=True), _ALL_WHOLE]
TokenSet = Annotated[
    list[TokenId], Field(json_schema_extra={"maxItems": MAX_ENTRIES}), Field(fail_fast=True), _ALL_WHOLE
]
AllowedTokens = Annotated[
    list[TokenId], Field(json_schema_extra={"minItems": 1, "maxItems": MAX_ENTRIES}), Field(fail_fast=True), _ALL_WHOLE
]
AnyTokens = Annotated[list[TokenId], Field(fail_fast=True), _ALL_WHOLE]
Text = Annotated[str, Field(json_schema_extra={"minLength": 1})]
Texts = Annotated[list[Text], Field(json_schema_extra={"minItems": 1}), Field(fail_fast=True)]
Sequences = Annotated[list[TokenIds], Field(json_schema_extra={"minItems": 1}), Field(fail_fast=True)]


FORMS = ("one text", "texts of a list", "token ids of a list", "lists of a list")
"""What locations of errors have behind the name of a field that may have these forms."""


def _form(value: object) -> str:
    """What `value` is by its first entry, so that a long list is not tried as each of them."""
    if not isinstance(value, list):
        return FORMS[0]
    first = value[0] if value else 0
    return FORMS[1 if isinstance(first, str) else 3 if isinstance(first, list) else 2]


TextsOrTokens = Annotated[
    Annotated[Text, Tag(FORMS[0])]
    | Annotated[Texts, Tag(FORMS[1])]
    | Annotated[TokenIds, Tag(FORMS[2])]
    | Annotated[Sequences, Tag(FORMS[3])],
    Discriminator(_form),
]
"""One text or sequence of tokens, or several."""

Count = Annotated[int, Field(json_schema_extra={"minimum": 1, "maximum": 128}), _WHOLE]
Length = Annotated[int, Field(le=_GREATEST, json_schema_extra={"minimum": 1}), _WHOLE]
LengthOrNone = Annotated[int, Field(le=_GREATEST, json_schema_extra={"minimum": 0}), _WHOLE]
TopK = Annotated[int, Field(le=_GREATEST, json_schema_extra={"minimum": -1}), _WHOLE]
Alternatives = Annotated[int, Field(json_schema_extra={"minimum": 0, "maximum": 20}), _WHOLE]
Seed = Annotated[int, _WHOLE]
Penalty = Annotated[float, Field(json_schema_extra={"minimum": -2, "maximum": 2})]
Repetition = Annotated[float, Field(json_schema_extra={"exclusiveMinimum": 0})]
Temperature = Annotated[float, Field(json_schema_extra={"minimum": 0})]
Share = Annotated[float, Field(json_schema_extra={"minimum": 0, "maximum": 1})]
Word = Annotated[str, Field(json_schema_extra={"minLength": 1, "maxLength": 4096})]
Words = Annotated[list[Word], Field(json_schema_extra={"maxItems": MAX_ENTRIES}), Field(fail_fast=True)]
Bias = Annotated[float, Field(json_schema_extra={"minimum": -100, "maximum": 100})]
Biases = Annotated[
    dict[str, Bias],
    Field(json_schema_extra={"propertyNames": {"pattern": "^[0-9]{1,19}$"}, "maxProperties": MAX_ENTRIES}),
]
No = Annotated[bool, Field(json_schema_extra={"const": False})]
NoLengthPenalty = Annotated[float, Field(json_schema_extra={"const": 1.0})]
NoSuffix = Annotated[str, Field(json_schema_extra={"maxLength": 0})]
Truncation = Annotated[int, Field(le=_GREATEST, json_schema_extra={"anyOf": [{"const": -1}, {"minimum": 1}]}), _WHOLE]


def refused(reason: str) -> BeforeValidator:
    """For a field of OpenAI's that has to be null; `reason` is for a client that gives it a value."""

    def check(value: object) -> None:
        if value is not None:
            raise ValueError(f"not supported: {reason}; leave it out")

    return BeforeValidator(check)
