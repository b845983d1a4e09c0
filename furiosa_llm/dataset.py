"""Reads datasets of prompts: JSON Lines, an object a line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from furiosa_llm.runtime.chat import conversations_of, render
from furiosa_llm.runtime.errors import InputError, TokenizerError
from furiosa_llm.runtime.prompts import Prompt, read_prompt
from furiosa_llm.runtime.tokenizer import Tokenizer

_PROMPTS = ("prompt", "prompt_token_ids", "messages")
"""The fields of which a line has one: a text, token ids, or a conversation for the model's chat template."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of a dataset.

    where: file and line, for messages.
    prompt, prompt_token_ids, messages: its prompt in one of these forms, the others None.
    max_tokens: of its completion; None if the line does not say.
    others: what else is in the line.
    """

    where: str
    prompt: str | None
    prompt_token_ids: Sequence[int] | None
    messages: Sequence[Mapping[str, Any]] | None
    max_tokens: int | None
    others: Mapping[str, Any]

    def token_ids(self, tokenizer: Tokenizer | None, vocab_size: int | None) -> list[int]:
        """The tokens of the prompt. Raises InputError, which names the line, for what has none, or wrong ones."""
        try:
            return read_prompt(self._prompt(tokenizer), tokenizer, vocab_size)[1]
        except ValueError as error:
            raise InputError(f"{self.where}: {error}") from error

    def _prompt(self, tokenizer: Tokenizer | None) -> Prompt:
        if self.prompt_token_ids is not None:
            return {"prompt_token_ids": self.prompt_token_ids}
        if self.messages is None:
            return {"prompt": self.prompt}
        if tokenizer is None:
            raise TokenizerError("messages need a tokenizer, and the model has none; give prompt_token_ids")
        return render(tokenizer, conversations_of(self.messages)[0])


def read_dataset(path: Path) -> list[Row]:
    """The rows of the file at `path`; empty lines are left out.

    Raises InputError, naming the line and the field, for what is no such file, and for one that has no row.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    rows = list(_rows(path, text))
    if not rows:
        raise InputError(f"{path} is empty, expected one JSON object a line with one of {', '.join(_PROMPTS)}")
    return rows


def _rows(path: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield _row(f"{path}, line {number}", line)


def _row(where: str, line: str) -> Row:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where}: is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise InputError(
            f"{where}: found a {type(found).__name__}, expected an object with one of {', '.join(_PROMPTS)}"
        )
    given = [name for name in _PROMPTS if found.get(name) is not None]
    if len(given) != 1:
        shown = ", ".join(given) or "none of them"
        raise InputError(f"{where}: found {shown}, expected one of {', '.join(_PROMPTS)}")
    max_tokens = found.get("max_tokens")
    if max_tokens is not None and (not isinstance(max_tokens, int) or isinstance(max_tokens, bool) or max_tokens < 1):
        raise InputError(f"{where}: max_tokens: found {max_tokens!r:.80}, expected an integer of at least 1")
    _check_kinds(where, found)
    return Row(
        where=where,
        prompt=found.get("prompt"),
        prompt_token_ids=found.get("prompt_token_ids"),
        messages=found.get("messages"),
        max_tokens=max_tokens,
        others={name: value for name, value in found.items() if name not in (*_PROMPTS, "max_tokens")},
    )


def _check_kinds(where: str, found: Mapping[str, Any]) -> None:
    for name, kind, expected in (
        ("prompt", str, "text"),
        ("prompt_token_ids", list, "a list"),
        ("messages", list, "a list"),
    ):
        value = found.get(name)
        if value is not None and not isinstance(value, kind):
            raise InputError(f"{where}: {name}: found a {type(value).__name__}, expected {expected}")
