"""What may be given as a prompt: a text, token ids, or a mapping with either, one of them or a list."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np

from furiosa_llm.runtime.errors import InputError

Prompt = str | Sequence[int] | Mapping[str, Any]
"""A text, its token ids, or one of both under the key `prompt` or `prompt_token_ids`."""


def listed(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """`prompts` as a list; a sequence of integers is one prompt, and so is what is no sequence."""
    several = isinstance(prompts, Sequence) and not isinstance(prompts, str | bytes)
    if several and not (prompts and _is_ids(prompts)):
        return list(cast(Sequence[Prompt], prompts))
    return [cast(Prompt, prompts)]


def unwrapped(prompt: Prompt) -> tuple[str | None, list[int] | None]:
    """The text and the token ids of a prompt: at least one of both. Raises InputError for what is no prompt."""
    text: Any = prompt
    token_ids: Any = None
    if isinstance(prompt, Mapping):
        text, token_ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
    elif not isinstance(prompt, str):
        text, token_ids = None, prompt
    is_text, is_ids = isinstance(text, str), _is_ids(token_ids)
    if not (is_text or is_ids) or (text is not None and not is_text) or (token_ids is not None and not is_ids):
        raise InputError(
            f"Unsupported prompt type: {type(prompt).__name__} {prompt!r:.80}; give a text, a list of token ids, or a "
            f"mapping with `prompt` or `prompt_token_ids`"
        )
    return text, [int(token) for token in token_ids] if is_ids else None


def check_tokens(token_ids: Sequence[int], vocab_size: int | None) -> None:
    """Raises InputError if there are no tokens, or one that a vocabulary of that size (None: unknown) has not."""
    if not token_ids:
        raise InputError("the prompt has no tokens; give a prompt that is not empty")
    for token in token_ids:
        if token < 0 or (vocab_size is not None and token >= vocab_size):
            known = "" if vocab_size is None else f" and below {vocab_size}"
            raise InputError(f"token {token} is unknown to the model; tokens are at least 0{known}")


def _is_ids(value: object) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str | bytes)
        and all(isinstance(item, int | np.integer) and not isinstance(item, bool) for item in value)
    )
