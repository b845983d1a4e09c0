"""What a completion has to look like: the vendor's and vLLM's `StructuredOutputsParams`, as a grammar of llguidance."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, field
from typing import Any, Self

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import GbnfToLarkError, any_to_lark, is_lark_syntax

from furiosa_llm.runtime.errors import SamplingParamsError
from furiosa_llm.runtime.tokens import parameter_checks as checks
from furiosa_llm.runtime.tokens.grammar import check_grammar
from furiosa_llm.runtime.tokens.json_schema import bounded
from furiosa_llm.runtime.tokens.parameter_checks import require

_KINDS = ("json", "regex", "choice", "grammar", "json_object")
_BLANKS = frozenset(("whitespace_flexible", "whitespace_pattern"))
_INLINED = re.compile(r"^\?(?=start\s*:)", re.MULTILINE)
_ESCAPED = re.compile(r"(?P<before>(?<!\\)(?:\\\\)*)\\(?P<code>u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8})")
_SPACES = r"[\x20\x0A\x0D\x09]{1,32}"
"""Between two tokens of JSON: enough to indent by, and an end to the blanks that models like to go on with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputsParams:
    """Constrains a completion, by exactly one of the first five; raises SamplingParamsError for what is no grammar.

    `docs/structured-output.md` says what they may hold. Making one compiles its grammar for a check, which takes a
    millisecond, or a second if it is large.
    """

    json: str | Mapping[str, Any] | None = None
    """A JSON schema, as a mapping or as text; kept as text."""
    regex: str | None = None
    """A regular expression, for the whole completion."""
    choice: tuple[str, ...] | list[str] | None = None
    """Texts, of which the completion is one."""
    grammar: str | None = None
    """A context-free grammar, in Lark's notation or in GBNF, of which `start` or `root` is the completion."""
    json_object: bool | None = None
    """True for any JSON object."""
    disable_any_whitespace: bool = False
    """Of JSON: no blanks between its tokens."""
    whitespace_pattern: str | None = None
    """Of JSON: a regular expression for the blanks between two tokens; None for at most 32."""
    llguidance_grammar: str = field(init=False, repr=False, compare=False)
    """What it all comes to, in the form that the library reads."""

    def __post_init__(self) -> None:
        if self.json_object is not None:
            checks.flag("structured_outputs.json_object", self.json_object)
        given = [name for name in _KINDS if getattr(self, name) not in (None, False)]
        require(
            len(given) == 1,
            f"structured_outputs: found {' and '.join(given) or 'nothing'}, expected one of {', '.join(_KINDS)}.",
        )
        [kind] = given
        checks.flag("structured_outputs.disable_any_whitespace", self.disable_any_whitespace)
        self._check_blanks(kind)
        try:
            text = self._grammar_of(kind)
        except SamplingParamsError:
            raise
        except (ValueError, RecursionError) as error:  # what the library cannot read, half a surrogate pair among it
            raise SamplingParamsError(f"structured_outputs.{kind} cannot be read: {error}") from error
        check_grammar(text, f"structured_outputs.{kind}")
        self._set("llguidance_grammar", text)

    def behind(self, rules: str) -> Self:
        """The same as a part of a grammar: `rules` in Lark's notation, which refer to it as `@answer`."""
        text = self.llguidance_grammar
        answer = {"lark_grammar": text} if self.grammar is not None else json.loads(text)["grammars"][0]
        whole = json.dumps({"grammars": [{"lark_grammar": rules}, {**answer, "name": "answer"}]})
        check_grammar(whole, "structured_outputs")
        made = copy(self)
        made._set("llguidance_grammar", whole)
        return made

    def _check_blanks(self, kind: str) -> None:
        pattern = self.whitespace_pattern
        if pattern is not None:
            _text("whitespace_pattern", pattern)
        require(
            not (self.disable_any_whitespace and pattern is not None),
            "structured_outputs: disable_any_whitespace and whitespace_pattern exclude each other; leave one out.",
        )
        require(
            kind in ("json", "json_object") or not (self.disable_any_whitespace or pattern is not None),
            f"structured_outputs: disable_any_whitespace and whitespace_pattern are for JSON, not for {kind}.",
        )

    def _grammar_of(self, kind: str) -> str:
        match kind:
            case "json":
                return self._json_grammar()
            case "json_object":
                return LLMatcher.grammar_from_json_schema(_with_blanks({"type": "object"}, self._blanks))
            case "regex":
                return LLMatcher.grammar_from_regex(_text("regex", self.regex))
            case "choice":
                choices = checks.strings("structured_outputs.choice", self.choice)
                require(bool(choices), "structured_outputs.choice must not be empty; leave it out to allow any text.")
                self._set("choice", choices)
                return LLMatcher.grammar_from_regex("|".join(map(literal_pattern, choices)))
            case _:
                return LLMatcher.grammar_from_lark(_lark(_text("grammar", self.grammar)))

    def _json_grammar(self) -> str:
        schema = _parsed_schema(self.json, "structured_outputs.json")
        self._set("json", json.dumps(schema, ensure_ascii=False, separators=(",", ":")))
        return LLMatcher.grammar_from_json_schema(_with_blanks(schema, self._blanks))

    @property
    def _blanks(self) -> dict[str, Any]:
        if self.disable_any_whitespace:
            return {"whitespace_flexible": False}
        return {"whitespace_pattern": self.whitespace_pattern or _SPACES}

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)


def _parsed_schema(schema: object, name: str) -> dict[str, Any]:
    """A JSON schema that was given as a mapping or as text; raises SamplingParamsError for anything else."""
    try:
        found = json.loads(schema if isinstance(schema, str) else json.dumps(schema, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise SamplingParamsError(f"{name} is not JSON: {error}; give a JSON schema, which is an object") from error
    if not isinstance(found, dict):
        raise SamplingParamsError(f"{name}: found {found!r:.80}, expected a JSON schema, which is an object")
    return found


def embedded_schema(schema: Mapping[str, Any]) -> str:
    """A JSON schema as a part of a grammar in Lark's notation, its blanks bounded as in `json`."""
    return f"%json {_with_blanks(schema, {'whitespace_pattern': _SPACES})}"


def _with_blanks(schema: Mapping[str, Any], blanks: Mapping[str, Any]) -> str:
    """A JSON schema as text, numbers bounded, with the library's setting for `blanks` unless it has its own."""
    options = schema.get("x-guidance", {})
    if not isinstance(options, dict) or _BLANKS & set(options):
        return json.dumps(schema)  # the library says what is wrong with it
    return json.dumps({**bounded(schema), "x-guidance": {**blanks, **options}})


def _lark(text: str) -> str:
    """A grammar in the library's notation, with neither `?start`, as in vLLM's examples, nor GBNF's long escapes."""
    text = _INLINED.sub("", text)
    try:
        return str(any_to_lark(text if is_lark_syntax(text) else _ESCAPED.sub(_character, text)))
    except GbnfToLarkError as error:
        raise SamplingParamsError(
            f"structured_outputs.grammar has no rule `start:`, and so is read as GBNF, which it is not: {error}"
        ) from error


def _character(found: re.Match[str]) -> str:
    code = int(found["code"][1:], 16)
    if code < 0x80:
        return f"{found['before']}\\x{code:02X}"
    return found["before"] + (chr(code) if code <= sys.maxunicode else found.group())


def _text(name: str, value: object) -> str:
    require(isinstance(value, str) and value != "", f"structured_outputs.{name} must be a text, got {value!r:.80}.")
    assert isinstance(value, str)
    return value


def literal_pattern(text: str) -> str:
    """A regular expression for `text` and nothing else."""
    return "".join(one if one.isascii() and one.isalnum() else f"\\x{{{ord(one):X}}}" for one in text)
