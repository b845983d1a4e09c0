"""Finds calls of tools in what a model writes, in the formats that models were taught, while it is still writing."""

from __future__ import annotations

import json
import uuid
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, ClassVar

from furiosa_llm.runtime.errors import InputError
from furiosa_llm.server.responses import CalledFunction, ToolCall
from furiosa_llm.server.tool_grammar import CallSyntax


@dataclass(slots=True)
class Found:
    """What a piece of text turned out to be: text for the reader, and calls."""

    content: str = ""
    calls: list[ToolCall] = field(default_factory=list)


class ToolFinder:
    """Takes one answer in pieces. Only calls of `names` count; what only looks like a call stays text.

    `syntax` is how calls are written that are forced.
    """

    syntax: ClassVar[CallSyntax]

    def __init__(self, names: Collection[str]) -> None:
        self._names = frozenset(names)
        self._held = ""

    def push(self, text: str) -> Found:
        """What is certain with `text`, the rest being held back."""
        raise NotImplementedError

    def flush(self) -> Found:
        """What was held back, at the end of the answer."""
        raise NotImplementedError

    def _call(self, value: Any) -> ToolCall | None:
        if not isinstance(value, dict):
            return None
        name, arguments = value.get("name"), value.get("arguments", value.get("parameters", {}))
        if not isinstance(name, str) or name not in self._names or not isinstance(arguments, dict):
            return None
        try:
            text = _as_json(arguments)
        except ValueError:  # NaN and infinity, which Python reads and JSON does not have
            return None
        return ToolCall(id=f"call_{uuid.uuid4().hex}", function=CalledFunction(name=name, arguments=text))


class HermesFinder(ToolFinder):
    """Calls between tags, with text around them: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`."""

    _OPEN, _CLOSE = "<tool_call>", "</tool_call>"
    syntax = CallSyntax(
        trigger=_OPEN,
        before_name='\n{"name": ',
        before_arguments=', "arguments": ',
        end="}\n" + _CLOSE,
        between="\n",
        text=r"(.|\n)*",
    )

    def __init__(self, names: Collection[str]) -> None:
        super().__init__(names)
        self._inside = False
        self._behind_call = False

    def push(self, text: str) -> Found:
        """What is certain with `text`, the rest being held back."""
        self._held += text
        found = Found()
        while self._step(found):
            pass
        return found

    def flush(self) -> Found:
        """What was held back; a call whose closing tag is missing counts if it is whole."""
        found = Found()
        self._take(found, self._held, f"{self._OPEN if self._inside else ''}{self._held}")
        self._held = ""
        return found

    def _step(self, found: Found) -> bool:
        """Goes to the next tag; False if there is none yet."""
        if self._behind_call:
            self._held = self._held.lstrip("\n")  # calls are written on lines of their own
            self._behind_call = not self._held
        tag = self._CLOSE if self._inside else self._OPEN
        before, seen, after = self._held.partition(tag)
        if not seen:
            if not self._inside:
                keep = _overlap(self._held, tag)
                end = len(self._held) - keep
                found.content, self._held = found.content + self._held[:end], self._held[end:]
            return False
        self._take(found, before, f"{self._OPEN}{before}{self._CLOSE}" if self._inside else before)
        self._held = after
        self._inside = not self._inside
        return True

    def _take(self, found: Found, inner: str, raw: str) -> None:
        call = self._call(_parsed(inner)) if self._inside else None
        if call is None:
            found.content += raw
        else:
            found.calls.append(call)
            self._behind_call = True


class Llama3JsonFinder(ToolFinder):
    """An answer of calls alone: `{"name": ..., "parameters": {...}}`, several parted by semicolons."""

    _TAG = "<|python_tag|>"
    syntax = CallSyntax(
        trigger="",
        before_name='{"name": ',
        before_arguments=', "parameters": ',
        end="}",
        between="; ",
        text=r"[ \n\r\t]*([^{< \n\r\t]|<[^|])(.|\n)*",  # no call, and no tag before one
    )

    def __init__(self, names: Collection[str]) -> None:
        super().__init__(names)
        self._is_text = False

    def push(self, text: str) -> Found:
        """`text`, unless the answer began as a call does: then nothing is certain before its end."""
        if self._is_text:
            return Found(content=text)
        self._held += text
        start = self._held.lstrip()
        if start.startswith(("{", self._TAG)) or self._TAG.startswith(start):
            return Found()
        self._is_text = True
        return Found(content=self._held)

    def flush(self) -> Found:
        """The calls, or the text if it is not calls altogether."""
        if self._is_text:
            return Found()
        values = _several(self._held.strip().removeprefix(self._TAG))
        calls = [self._call(value) for value in values]
        if calls and None not in calls:
            return Found(calls=[call for call in calls if call is not None])
        return Found(content=self._held)


ToolParser = type[ToolFinder]

TOOL_PARSERS: dict[str, ToolParser] = {"hermes": HermesFinder, "llama3_json": Llama3JsonFinder}


def tool_parser(name: str | None) -> ToolParser | None:
    """The parser of that name, None for none; raises InputError for an unknown one."""
    if name is not None and name not in TOOL_PARSERS:
        raise InputError(f"tool_call_parser={name!r:.80} is unknown; give one of {', '.join(TOOL_PARSERS)}")
    return None if name is None else TOOL_PARSERS[name]


def _overlap(text: str, tag: str) -> int:
    """The length of the longest end of `text` that `tag` begins with."""
    return next(length for length in range(min(len(text), len(tag) - 1), -1, -1) if text.endswith(tag[:length]))


def _as_json(value: Any) -> str:
    """`value` as JSON that can be sent: half of a surrogate pair stays the escape that it was written as."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value)
    return text


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _several(text: str) -> list[Any]:
    """The JSON values of `text`, which semicolons part; None for what is no JSON."""
    decoder = json.JSONDecoder()
    values: list[Any] = []
    while text := text.strip().removeprefix(";").strip():
        try:
            value, end = decoder.raw_decode(text)
        except (ValueError, RecursionError):
            return [None]
        values.append(value)
        text = text[end:]
    return values
