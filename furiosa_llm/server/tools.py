"""Finds calls of tools in what a model writes, in the formats that models were taught, while it is still writing."""

from __future__ import annotations

import ast
import json
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from furiosa_llm.runtime.errors import InputError
from furiosa_llm.server.call_formats import CALL_FORMATS, CallFormat
from furiosa_llm.server.responses import CalledFunction, ToolCall
from furiosa_llm.server.tool_grammar import kinds_of


@dataclass(slots=True, kw_only=True)
class CallPiece:
    """What is new of a call: its id and name first, then its arguments, which is JSON as text, piece by piece."""

    index: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None


@dataclass(slots=True)
class Found:
    """What a piece of text turned out to be: text for the reader, what the model thinks, and pieces of calls."""

    content: str = ""
    calls: list[CallPiece] = field(default_factory=list)
    reasoning: str = ""

    def add(self, other: Found) -> None:
        """Takes what follows."""
        self.content += other.content
        self.reasoning += other.reasoning
        self.calls += other.calls


def whole_calls(pieces: Iterable[CallPiece]) -> list[ToolCall]:
    """The calls that the pieces add up to."""
    calls: list[ToolCall] = []
    for piece in pieces:
        if piece.id is not None and piece.name is not None:
            calls.append(ToolCall(id=piece.id, function=CalledFunction(name=piece.name, arguments="")))
        calls[-1].function.arguments += piece.arguments
    return calls


class ToolFinder:
    """Takes one answer in pieces. Only calls of `functions` count; what only looks like a call stays text.

    `functions` are names, with the schemas of the arguments if they are known. With `streams` a call is told while it
    is written, once its name is known; without it when it is whole, and one that is none stays text.
    """

    def __init__(
        self, form: CallFormat, functions: Mapping[str, dict[str, Any]] | Iterable[str], *, streams: bool = False
    ) -> None:
        self._form = form
        self._functions = dict(functions) if isinstance(functions, Mapping) else {name: {} for name in functions}
        self._streams = streams
        self._held = ""
        self._open: str | None = None
        """What the block that is being read began with; None outside of one."""
        self._begun = False
        """Whether anything but blanks has come."""
        self._called = False
        """Whether the block had a call that was told already."""
        self._behind = False
        """Whether a block has just ended, behind which blank lines are left out."""
        self._arguments: _JsonText | _Parameters | None = None
        self._num_calls = 0

    def push(self, text: str) -> Found:
        """What is certain with `text`, the rest being held back."""
        self._held += text
        found = Found()
        while self._step(found):
            pass
        return found

    def flush(self) -> Found:
        """What was held back, at the end of the answer; a block whose end is missing counts if its calls are whole."""
        found = Found()
        if self._arguments is None:
            if self._open is None:
                found.content += self._held
            else:
                self._end_block(found, self._held, "")
        self._held = ""
        return found

    def _step(self, found: Found) -> bool:
        """Goes one thing further; False if there is none yet."""
        if self._arguments is not None:
            return self._read_arguments(found, self._arguments)
        return self._look_for_block(found) if self._open is None else self._look_into_block(found)

    def _look_for_block(self, found: Found) -> bool:
        if self._behind:
            self._held = self._held.lstrip("\n")  # calls are written on lines of their own
            self._behind = not self._held
        if not self._begun and self._form.bare:
            start = self._held.lstrip()
            if not start or any(tag.startswith(start) for tag in self._form.opens):
                return False
            if start.startswith(self._form.bare):
                self._open, self._begun = "", True
                return True
        self._begun = self._begun or bool(self._held.strip())
        places = [(place, tag) for tag in self._form.opens if (place := self._held.find(tag)) >= 0]
        if places:
            place, tag = min(places)
            found.content += self._held[:place].strip() if self._form.bare else self._held[:place]
            self._open, self._held = tag, self._held[place + len(tag) :]
            return True
        keep = max((overlap(self._held, tag) for tag in self._form.opens), default=0)
        end = len(self._held) - keep
        found.content, self._held = found.content + self._held[:end], self._held[end:]
        return False

    def _look_into_block(self, found: Found) -> bool:
        if self._streams and not self._form.is_python and (begin := self._begin_of_call(self._held)) is not None:
            name, end = begin
            self._held = self._held[end:]
            self._arguments = self._reader_of(name)
            self._called = True
            found.calls.append(self._new(name))
            return True
        places = [(place, tag) for tag in self._form.closes if (place := self._held.find(tag)) >= 0]
        if not places:
            return False
        place, tag = min(places)
        inner, self._held = self._held[:place], self._held[place + len(tag) :]
        self._end_block(found, inner, tag)
        return True

    def _begin_of_call(self, text: str, place: int = 0) -> tuple[str, int] | None:
        """The function of the call that begins at `place`, and where its arguments do; None if none does."""
        match = self._form.begin.match(text, self._behind_call(text, place))
        if match is None:
            return None
        names = match.groupdict()
        quoted = names.get("quoted")
        name = names["name"] if quoted is None else _parsed(f'"{quoted}"')
        return (name, match.end()) if isinstance(name, str) and name in self._functions else None

    def _behind_call(self, text: str, place: int) -> int:
        """Where the next call can begin, if one has ended at `place`."""
        end = self._form.end.match(text, place) if self._form.parameters is None else None
        between = self._form.between.match(text, end.end() if end else place)
        return between.end() if between else place

    def _reader_of(self, name: str) -> _JsonText | _Parameters:
        return _JsonText() if self._form.parameters is None else _Parameters(self._form, self._functions[name])

    def _read_arguments(self, found: Found, reader: _JsonText | _Parameters) -> bool:
        piece, self._held = reader.read(self._held)
        if piece and found.calls and found.calls[-1].index == self._num_calls - 1:
            found.calls[-1].arguments += piece
        elif piece:
            found.calls.append(CallPiece(index=self._num_calls - 1, arguments=piece))
        if not reader.done:
            return False
        self._arguments = None
        return True

    def _end_block(self, found: Found, inner: str, tag: str) -> None:
        """Takes a block, of which `inner` has not been told, and which ends with `tag`."""
        if self._called:  # what is left of it are brackets and blanks, or nothing that can be read
            found.content += inner[self._behind_call(inner, 0) :]
        elif (calls := self._whole(inner, tag)) is not None:
            for name, arguments in calls:
                piece = self._new(name)
                piece.arguments = arguments
                found.calls.append(piece)
        else:
            found.content += f"{self._open}{inner}{tag}"
            self._open = None
            return
        self._open, self._called, self._behind = None, False, True

    def _whole(self, text: str, tag: str) -> list[tuple[str, str]] | None:
        """The calls of a block, with their arguments as JSON; None if it is anything else than calls."""
        if self._form.is_python:
            made = _python_calls(text)
        elif self._form.parameters is None and (values := _several(text)) is not None:
            made = [_name_and_arguments(value) for value in values]
        else:
            made = self._read_one_by_one(text, tag or "".join(self._form.closes[:1]))
        calls = []
        for name, arguments in made or ():
            shown = _as_json(arguments) if isinstance(arguments, dict) and name in self._functions else None
            if shown is None:
                return None
            calls.append((name, shown))
        return calls or None

    def _read_one_by_one(self, text: str, tag: str) -> list[tuple[Any, Any]] | None:
        found: list[tuple[Any, Any]] = []
        text, place = text + tag, 0
        while (begin := self._begin_of_call(text, place)) is not None:
            name, start = begin
            reader = self._reader_of(name)
            arguments, rest = reader.read(text[start:])
            if not reader.done:
                return None
            place = len(text) - len(rest)
            found.append((name, _parsed(arguments)))
        return found if text[self._behind_call(text, place) :] == tag else None

    def _new(self, name: str) -> CallPiece:
        self._num_calls += 1
        return CallPiece(index=self._num_calls - 1, id=f"call_{uuid.uuid4().hex}", name=name)


class _JsonText:
    """Follows one object of JSON, as it comes, to its end."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self.done = False

    def read(self, text: str) -> tuple[str, str]:
        """What of `text` is of the object, and the rest, which is empty until the object is whole."""
        for place, one in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped, self._in_string = one == "\\", one != '"'
            elif one == '"':
                self._in_string = True
            elif one in "{[":
                self._depth += 1
            elif one in "}]":
                self._depth -= 1
                if not self._depth:
                    self.done = True
                    return text[: place + 1], text[place + 1 :]
        return text, ""


class _Parameters:
    """Makes an object of arguments that are written one by one."""

    def __init__(self, form: CallFormat, schema: dict[str, Any]) -> None:
        assert form.parameters is not None
        self._written = form.parameters
        properties = schema.get("properties")
        self._properties = properties if isinstance(properties, dict) else {}
        self._before = "{"
        self.done = False

    def read(self, text: str) -> tuple[str, str]:
        """The arguments that are whole, and what is left of `text`."""
        made = ""
        text = text.lstrip()
        while match := self._written.one.match(text):
            key, value = match["key"].strip(), match["value"]
            made += f"{self._before}{json.dumps(key, ensure_ascii=False)}: {self._value(key, value)}"
            self._before = ", "
            text = text[match.end() :]
        if match := self._written.end.match(text):
            self.done = True
            return made + ("{}" if self._before == "{" else "}"), text[match.end() :]
        return made, text

    def _value(self, key: str, text: str) -> str:
        """A value as JSON: text, unless its schema asks for something else, and it is that."""
        kinds = kinds_of(self._properties.get(key))
        if kinds and kinds != {"string"}:
            value = _parsed({"True": "true", "False": "false", "None": "null"}.get(text.strip(), text))
            if value is not None or "null" in kinds:
                return _as_json(value) or json.dumps(text)
        return json.dumps(text, ensure_ascii=False)


def call_format(name: str | None) -> CallFormat | None:
    """The format of that name, None for none; raises InputError for an unknown one."""
    if name is not None and name not in CALL_FORMATS:
        raise InputError(f"tool_call_parser={name!r:.80} is unknown; give one of {', '.join(CALL_FORMATS)}")
    return None if name is None else CALL_FORMATS[name]


def overlap(text: str, tag: str) -> int:
    """The length of the longest end of `text` that `tag` begins with."""
    return next(length for length in range(min(len(text), len(tag) - 1), -1, -1) if text.endswith(tag[:length]))


def _name_and_arguments(value: Any) -> tuple[Any, Any]:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None, None
    return value["name"], value.get("arguments", value.get("parameters", {}))


def _as_json(arguments: Any) -> str | None:
    """`arguments` as JSON that can be sent: half of a surrogate pair stays the escape that it was written as.

    None for what has no JSON: NaN, infinity and sets, which Python reads.
    """
    try:
        text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError):
        return None
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(arguments)
    return text


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _several(text: str) -> list[Any] | None:
    """The JSON values of `text`, which semicolons part, and those of lists; None if it is something else."""
    decoder = json.JSONDecoder()
    values: list[Any] = []
    while text := text.strip().removeprefix(";").strip():
        try:
            value, end = decoder.raw_decode(text)
        except (ValueError, RecursionError):
            return None
        values += value if isinstance(value, list) else [value]
        text = text[end:]
    return values


def _python_calls(text: str) -> list[tuple[Any, Any]] | None:
    """The calls of a list as Python writes it, with literals as arguments."""
    try:
        body = ast.parse(text.strip(), mode="eval").body
        calls = body.elts if isinstance(body, ast.List) else []
        return [_python_call(call) for call in calls]
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
        return None


def _python_call(call: ast.expr) -> tuple[str, dict[str, Any]]:
    if not isinstance(call, ast.Call) or call.args or any(keyword.arg is None for keyword in call.keywords):
        raise ValueError("not a call with named arguments")
    name = ast.unparse(call.func)
    return name, {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
