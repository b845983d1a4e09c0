"""Grammars for calls of tools: calls that have to be made, and calls that may be made, with arguments by schema."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from furiosa_llm.runtime.tokens.structured_outputs import embedded_schema, literal_pattern

_NAME = re.compile(r"[\w.-]+")
_KEY = re.compile(r"[\w.-]+")
_ABOUT = frozenset(("title", "description", "default", "examples", "deprecated"))
"""Keywords of a schema that demand nothing."""
_SHARED = frozenset(("$defs", "definitions", "x-guidance"))
"""What the schemas of arguments have from the whole one."""
_OF_OBJECTS = _ABOUT | _SHARED | {"type", "properties", "required", "additionalProperties", "$schema"}
_OF_TEXTS = _ABOUT | {"type"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterSyntax:
    """How a model writes an argument: text as it is, all else as JSON."""

    before_key: str
    """What stands before the name of the argument."""
    before_value: str
    """What stands between its name and its value."""
    ends: str
    """What ends the value."""
    after: str
    """What stands after that."""


def can_be_text(schema: Mapping[str, Any]) -> bool:
    """Whether arguments by `schema` can be written one by one, each by its own schema: no more is demanded of them."""
    properties = schema.get("properties", {} if schema.get("additionalProperties") is False else None)
    return (
        isinstance(properties, dict)
        and set(schema) <= _OF_OBJECTS
        and set(schema.get("required", [])) <= set(properties)
        and all(_NAME.fullmatch(key) and _is_written(one) for key, one in properties.items())
    )


def _is_written(schema: Any) -> bool:
    if not isinstance(schema, dict) or not (kinds := kinds_of(schema)):
        return False  # it would be read as text, whatever it is
    if kinds != {"string"}:
        return True
    chosen = _chosen(schema)
    if chosen is None:
        return set(schema) <= _OF_TEXTS
    return set(schema) <= _OF_TEXTS | {"enum", "const"} and all(
        isinstance(one, str) and one == one.strip("\n") and "</" not in one for one in chosen
    )


def _chosen(schema: Mapping[str, Any]) -> list[Any] | None:
    """The values that are allowed, if they are listed."""
    found = [schema["const"]] if "const" in schema else schema.get("enum")
    return found if isinstance(found, list) else None


def kinds_of(schema: Any) -> set[Any]:
    """The types of values by a schema; none if it does not say."""
    if not isinstance(schema, dict):
        return set()
    kind = schema.get("type")
    found = {one for one in (kind if isinstance(kind, list) else [kind]) if isinstance(one, str)}
    for alternatives in (schema.get("anyOf"), schema.get("oneOf")):
        if isinstance(alternatives, list):
            found.update(one for part in alternatives for one in kinds_of(part))
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class CallSyntax:
    """How a model writes calls."""

    trigger: str
    """What a call begins with, if text may stand around calls; empty if an answer is either text or calls."""
    before_name: str
    """What stands between the trigger and the function's name."""
    before_arguments: str
    """What stands between the name and the arguments."""
    end: str
    """What stands after the arguments."""
    between: str = ""
    """What stands between two calls."""
    text: str = r"(.|\n)*"
    """A regular expression for an answer without calls."""
    opens: str = ""
    """What stands between a trigger and the first of the calls that follow it."""
    closes: str = ""
    """What stands after the last one; empty if each has a trigger of its own."""
    quotes: bool = True
    """Whether the name is written as JSON has it."""
    parameters: ParameterSyntax | None = None
    """How the arguments are written; None for JSON."""

    def can_write(self, functions: Sequence[CallableFunction]) -> bool:
        """Whether calls of `functions` can be written so that their schemas are kept to, and read again."""
        if self.quotes:
            return True
        named = all(_NAME.fullmatch(function.name) for function in functions)
        return named and (self.parameters is None or all(can_be_text(one.parameters) for one in functions))


@dataclass(frozen=True, slots=True, kw_only=True)
class CallableFunction:
    """A function that may be called."""

    name: str
    """What it is called."""
    parameters: dict[str, Any]
    """The JSON schema of its arguments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CallWriting:
    """How the calls of one answer are written."""

    syntax: CallSyntax
    """The model's syntax."""
    tags: Collection[str]
    """The tokens of the form `<...>` that it has: it writes them as tokens, where another spells them."""
    several: bool
    """Whether there may be more than one."""


class CallGrammar:
    """Grammars for answers with calls of `functions`."""

    def __init__(self, functions: Sequence[CallableFunction], writing: CallWriting) -> None:
        self._functions = functions
        self._syntax = writing.syntax
        self._tags = sorted(writing.tags)
        self._several = writing.several

    def forced(self) -> str:
        """For answers that are calls."""
        return "\n".join([f"start: {self._calls()}", *self._call_rules()])

    def or_json(self, schema: dict[str, Any]) -> str:
        """For answers that are calls, or JSON by `schema`; only of a syntax with a trigger.

        The library takes the longest piece that fits what may follow: a call that begins as JSON does hides the JSON.
        """
        return "\n".join(
            [f"start: {self._calls()} | answer", f"answer: {embedded_schema(schema)}", *self._call_rules()]
        )

    def or_text(self) -> str:
        """For answers that are text, with calls wherever the syntax allows them."""
        trigger, text = self._syntax.trigger, f"TEXT: /{self._syntax.text}/"
        if not trigger:
            return "\n".join([f"start: {self._calls()} | TEXT |", text, *self._call_rules()])
        # The text in front of a call ends at the first trigger, after which nothing but a call fits.
        begin = f"spelled | TEXT {trigger}" if trigger in self._tags else "spelled"
        return "\n".join(
            [
                f"start: (text_call){'*' if self._several else '?'} TEXT",
                f"text_call: ({begin}) {self._rest()}",
                f"spelled[lazy]: TEXT {_literal(trigger)}",
                text,
                *self._function_rules(),
            ]
        )

    @property
    def _names(self) -> str:
        return " | ".join(f"function_{index}" for index in range(len(self._functions)))

    def _calls(self) -> str:
        if self._syntax.closes:
            return f"{self._written(self._syntax.trigger)} {self._rest()}"
        return f"call ({self._written(self._syntax.between)} call)*" if self._several else "call"

    def _rest(self) -> str:
        """What follows a trigger."""
        one, between = f"({self._names})", self._written(self._syntax.between)
        if not self._syntax.closes:
            return one
        more = f"({between} {one})*" if self._several else ""
        return f"{self._written(self._syntax.opens)} {one} {more} {self._written(self._syntax.closes)}"

    def _call_rules(self) -> list[str]:
        return [f"call: {self._written(self._syntax.trigger)} ({self._names})", *self._function_rules()]

    def _function_rules(self) -> list[str]:
        """A rule for each function, which begins after the trigger."""
        syntax, rules = self._syntax, []
        for index, function in enumerate(self._functions):
            name = json.dumps(function.name, ensure_ascii=False) if syntax.quotes else function.name
            begin = f"{self._written(syntax.before_name)} {_literal(name)} {self._written(syntax.before_arguments)}"
            if syntax.parameters is None:
                arguments = embedded_schema(function.parameters)
            else:
                arguments = self._parameters(syntax.parameters, function.parameters)
            rules.append(f"function_{index}: {begin} {arguments} {self._written(syntax.end)}")
        if syntax.parameters is not None:
            rules += self._value_rules(syntax.parameters.ends)
        return rules

    def _parameters(self, syntax: ParameterSyntax, schema: Mapping[str, Any]) -> str:
        """The arguments in the order of the schema, of which some may be left out."""
        required = schema.get("required", [])
        shared = {key: schema[key] for key in _SHARED if key in schema}
        parts = []
        for key, one in schema.get("properties", {}).items():
            begin = f"{self._written(syntax.before_key)} {_literal(key)} {self._written(syntax.before_value)}"
            chosen = _chosen(one)
            if kinds_of(one) != {"string"}:
                value = f"{embedded_schema({**shared, **one})} {self._written(syntax.ends)}"
            elif chosen is None:
                value = "value"
            else:
                value = f"({' | '.join(map(_literal, chosen))}) {self._written(syntax.ends)}"
            part = f"({begin} {value} {self._written(syntax.after)})"
            parts.append(part if key in required else f"{part}?")
        return " ".join(parts)

    def _value_rules(self, ends: str) -> list[str]:
        """Text up to what ends it: spelled, or with the token that its tag is."""
        last = next((tag for tag in self._tags if ends.endswith(tag)), None)
        as_token = "" if last is None else f" | VALUE {last}"
        spelled = f"spelled_value[lazy]: VALUE {_literal(ends)}"
        return [f"value: spelled_value{as_token}", spelled, r"VALUE: /(.|\n)*/"]

    def _written(self, text: str) -> str:
        """`text` in Lark's notation, with tags as tokens; only of what the syntax itself has, never of a request's."""
        tags = "|".join(map(re.escape, self._tags))
        parts = re.split(f"({tags})", text) if tags else [text]
        return " ".join(part if part in self._tags else _literal(part) for part in parts if part)


def _literal(text: str) -> str:
    return f"/{literal_pattern(text)}/"
