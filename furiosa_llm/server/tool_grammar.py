"""Grammars for calls of tools: calls that have to be made, and calls that may be made, with arguments by schema."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from furiosa_llm.runtime.tokens.structured_outputs import embedded_schema, literal_pattern


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
    between: str
    """What stands between two calls."""
    text: str
    """A regular expression for an answer without calls."""


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
        self._tags = sorted(tag for tag in writing.tags if tag.isascii())
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
        begin = f"spelled | TEXT {self._written(trigger)}" if trigger in self._tags else "spelled"
        return "\n".join(
            [
                f"start: (text_call){'*' if self._several else '?'} TEXT",
                f"text_call: ({begin}) ({self._names})",
                f"spelled[lazy]: TEXT {_literal(trigger)}",
                text,
                *self._function_rules(),
            ]
        )

    @property
    def _names(self) -> str:
        return " | ".join(f"function_{index}" for index in range(len(self._functions)))

    def _calls(self) -> str:
        return f"call ({_literal(self._syntax.between)} call)*" if self._several else "call"

    def _call_rules(self) -> list[str]:
        return [f"call: {self._written(self._syntax.trigger)} ({self._names})", *self._function_rules()]

    def _function_rules(self) -> list[str]:
        """A rule for each function, which begins after the trigger."""
        syntax, rules = self._syntax, []
        for index, function in enumerate(self._functions):
            name = json.dumps(function.name, ensure_ascii=False)
            begin = _literal(f"{syntax.before_name}{name}{syntax.before_arguments}")
            schema = embedded_schema(function.parameters)
            rules.append(f"function_{index}: {begin} {schema} {self._written(syntax.end)}")
        return rules

    def _written(self, text: str) -> str:
        """`text` in Lark's notation, with tags as tokens; only of what the syntax itself has, never of a request's."""
        tags = "|".join(map(re.escape, self._tags))
        parts = re.split(f"({tags})", text) if tags else [text]
        return " ".join(part if part in self._tags else _literal(part) for part in parts if part)


def _literal(text: str) -> str:
    return f"/{literal_pattern(text)}/"
