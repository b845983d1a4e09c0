"""Grammars for calls of tools: calls that have to be made, and calls that may be made, with arguments by schema."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from furiosa_llm.runtime.structured_outputs import embedded_schema, literal_pattern


@dataclass(frozen=True, slots=True, kw_only=True)
class CallSyntax:
    """How a model writes calls.

    trigger: what a call begins with, if text may stand around calls; empty if an answer is either text or calls.
    before_name: what stands between the trigger and the function's name.
    before_arguments: what stands between the name and the arguments.
    end: what stands behind the arguments.
    between: what stands between two calls.
    text: a regular expression for an answer without calls.
    """

    trigger: str
    before_name: str
    before_arguments: str
    end: str
    between: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CallableFunction:
    """A function that may be called.

    name: what it is called.
    parameters: the JSON schema of its arguments.
    """

    name: str
    parameters: dict[str, Any]


def forced_calls(functions: Sequence[CallableFunction], syntax: CallSyntax, *, several: bool) -> str:
    """A grammar for answers that are calls, one or, if `several`, any number from one on."""
    return "\n".join([f"start: {_calls(syntax, several=several)}", *_rules(functions, syntax)])


def calls_or_format(
    functions: Sequence[CallableFunction], syntax: CallSyntax, schema: dict[str, Any], *, several: bool
) -> str:
    """A grammar for answers that are calls, or JSON by `schema`."""
    start = f"start: {_calls(syntax, several=several)} | answer"
    return "\n".join([start, f"answer: {embedded_schema(schema)}", *_rules(functions, syntax)])


def calls_or_text(functions: Sequence[CallableFunction], syntax: CallSyntax, *, several: bool) -> str:
    """A grammar for answers that are text, with calls wherever the syntax allows them."""
    text = f"TEXT: /{syntax.text}/"
    if not syntax.trigger:
        start = f"start: {_calls(syntax, several=several)} | TEXT |"
        return "\n".join([start, text, *_rules(functions, syntax)])
    # The text in front of a call ends at the first trigger, behind which nothing but a call fits.
    start = f"start: (text_call){'*' if several else '?'} TEXT"
    parts = [f"text_call: trigger ({_names(functions)})", f"trigger[lazy]: TEXT {_literal(syntax.trigger)}"]
    return "\n".join([start, *parts, text, *_rules(functions, syntax)[1:]])


def _calls(syntax: CallSyntax, *, several: bool) -> str:
    return f"call ({_literal(syntax.between)} call)*" if several else "call"


def _rules(functions: Sequence[CallableFunction], syntax: CallSyntax) -> list[str]:
    """The rule `call`, then one for each function, without the trigger."""
    trigger = f"{_literal(syntax.trigger)} " if syntax.trigger else ""
    rules = [f"call: {trigger}({_names(functions)})"]
    for index, function in enumerate(functions):
        begin = f"{syntax.before_name}{json.dumps(function.name, ensure_ascii=False)}{syntax.before_arguments}"
        schema = embedded_schema(function.parameters)
        rules.append(f"function_{index}: {_literal(begin)} {schema} {_literal(syntax.end)}")
    return rules


def _names(functions: Sequence[CallableFunction]) -> str:
    return " | ".join(f"function_{index}" for index in range(len(functions)))


def _literal(text: str) -> str:
    return f"/{literal_pattern(text)}/"
