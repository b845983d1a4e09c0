"""Reads the datasets of benchmarks: JSON Lines, one prompt a line, with what its completion is compared to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from furiosa_llm.runtime.errors import InputError
from furiosa_llm.runtime.requests.prompts import Prompt, read_prompt
from furiosa_llm.runtime.tokens.tokenizer import Tokenizer

_PROMPTS: dict[str, str] = {
    "prompt": "a text that is not empty",
    "prompt_token_ids": "a list of integers that is not empty",
    "messages": "a list of objects with role and content that is not empty",
}
_BESIDE = ("max_tokens", "reference", "label")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One line of a dataset."""

    where: str
    """The file and the line, for messages."""
    prompt: Prompt | None
    """A text or token ids; None if the sample is a conversation."""
    messages: list[dict[str, Any]] | None
    """A conversation, which the model's chat template makes a text of; None if there is none."""
    max_tokens: int | None
    """The most tokens of the completion; None if the line does not say."""
    reference: str | None
    """The text that a completion is compared to; None if there is none."""
    label: str | None
    """The nearest other text, by an encoder's vectors, should have the same label; None if there is none."""

    def token_ids(
        self,
        tokenizer: Tokenizer | None,
        vocab_size: int | None,
        *,
        add_special_tokens: bool = False,
        max_length: int | None = None,
    ) -> list[int]:
        """What the model reads, the first `max_length` tokens; raises InputError, naming the line, for what it cannot.

        A conversation becomes a text by the model's chat template.
        """
        try:
            prompt = self.prompt
            if prompt is None:
                if tokenizer is None:
                    raise InputError("messages need a tokenizer with a chat template; give prompt_token_ids")
                prompt = tokenizer.apply_chat_template(self.messages or [])
            _, ids = read_prompt(
                prompt, tokenizer, vocab_size, add_special_tokens=add_special_tokens, max_length=max_length
            )
        except ValueError as error:
            raise InputError(f"--dataset: {self.where}: {error}") from error
        return ids


def read_dataset(path: Path, count: int | None = None) -> list[Sample]:
    """The samples of `path`, or the first `count` of them; raises InputError, naming line and field."""
    try:
        lines = path.read_text("utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise InputError(f"--dataset: {path} cannot be read: {error}") from error
    samples: list[Sample] = []
    for number, line in enumerate(lines, start=1):
        if line.strip() and (count is None or len(samples) < count):
            samples.append(_sample(line, f"{path}, line {number}"))
    if not samples:
        raise InputError(f"--dataset: {path} has no samples, expected one JSON object a line; give another file")
    if count is not None and len(samples) < count:
        raise InputError(f"--count is {count}, but {path} has {len(samples)} samples; give at most that many")
    return samples


def _sample(line: str, where: str) -> Sample:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"--dataset: {where}: not JSON: {error}; give one object a line") from error
    if not isinstance(found, dict):
        raise InputError(f"--dataset: {where}: found a {type(found).__name__}, expected an object")
    unknown = sorted(set(found) - {*_PROMPTS, *_BESIDE})
    given = [name for name in _PROMPTS if name in found]
    if unknown or len(given) != 1:
        names = ", ".join(unknown or given) or "none of them"
        raise InputError(
            f"--dataset: {where}: found {names:.200}; expected one of {', '.join(_PROMPTS)}, and next to it at most "
            f"{', '.join(_BESIDE)}"
        )
    [name] = given
    if not _is_prompt(name, found[name]):
        raise InputError(f"--dataset: {where}: {name} is {found[name]!r:.60}, expected {_PROMPTS[name]}")
    return Sample(
        where=where,
        prompt=found[name] if name != "messages" else None,
        messages=found[name] if name == "messages" else None,
        max_tokens=_max_tokens(found, where),
        reference=_text(found, "reference", where),
        label=_text(found, "label", where),
    )


def _is_prompt(name: str, value: object) -> bool:
    if name == "prompt":
        return isinstance(value, str) and bool(value)
    if not isinstance(value, list) or not value:
        return False
    if name == "prompt_token_ids":
        return all(type(one) is int for one in value)
    return all(isinstance(one, dict) and {"role", "content"} <= set(one) for one in value)


def _max_tokens(found: Mapping[str, Any], where: str) -> int | None:
    value = found.get("max_tokens")
    if value is not None and (type(value) is not int or value < 1):
        raise InputError(f"--dataset: {where}: max_tokens is {value!r:.60}, expected an integer of at least 1")
    return value


def _text(found: Mapping[str, Any], name: str, where: str) -> str | None:
    value = found.get(name)
    if value is not None and not isinstance(value, str):
        raise InputError(f"--dataset: {where}: {name} is {value!r:.60}, expected a text")
    return value
