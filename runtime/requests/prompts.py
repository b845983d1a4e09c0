"""What may be given as a prompt (a text, token ids, or a mapping with either or both), and how its tokens are found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, TypeGuard, cast

import numpy as np

from furiosa_llm.runtime.errors import ContextLengthError, InputError, TokenizerError, UnsupportedError
from furiosa_llm.runtime.tokens.tokenizer import Tokenizer

Prompt: TypeAlias = str | Sequence[int] | Mapping[str, Any]
"""A text, its token ids, or one or both under the keys `prompt` and `prompt_token_ids`, the ids being what is run."""

_KEYS = ("prompt", "prompt_token_ids")
_MAX_TOKENS = 2**31
"""What token ids are below if the model does not say."""


def listed(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """`prompts` as a list; a sequence of integers is one prompt, and so is what is no sequence."""
    several = isinstance(prompts, Sequence) and not isinstance(prompts, str | bytes)
    if several and not (prompts and _is_ids(prompts)):
        return list(cast(Sequence[Prompt], prompts))
    return [cast(Prompt, prompts)]


def paired(prompts: Any, token_ids: Any) -> tuple[list[Prompt], bool]:
    """The prompts of `LLM.generate`, each with its token ids if there are any, and whether it is a single one.

    A list or tuple of `prompts` is several, or one as token ids, which is a list of one; anything else is one. Without
    prompts `token_ids` are one, or a list.
    """
    if prompts is None:
        if token_ids is None:
            raise InputError("prompts: found None; give a prompt, a list of them, or prompt_token_ids")
        return [{"prompt_token_ids": ids} for ids in listed(token_ids)], _is_ids(token_ids) and len(token_ids) > 0
    single = not isinstance(prompts, list | tuple)
    several = [prompts] if single or (prompts and _is_ids(prompts)) else list(prompts)
    if token_ids is None:
        return several, single
    ids = [token_ids] if single else listed(token_ids)
    if len(ids) != len(several):
        raise InputError(f"prompt_token_ids has {len(ids)} sequences for {len(several)} prompts")
    return [{"prompt": text, "prompt_token_ids": own} for text, own in zip(several, ids, strict=True)], single


def read_prompt(
    prompt: Prompt,
    tokenizer: Tokenizer | None,
    vocab_size: int | None,
    *,
    add_special_tokens: bool = False,
    max_length: int | None = None,
) -> tuple[str | None, list[int]]:
    """The text of `prompt`, if it has one, and its tokens, the first `max_length` of them.

    `vocab_size` is None if the model does not say. Raises InputError for what is no prompt, has no tokens, or has some
    that the model does not know, and TokenizerError for text that cannot be encoded.
    """
    text, given = _parts(prompt)
    if given is None:
        if tokenizer is None:
            raise TokenizerError("the artifact has no tokenizer.json; give token ids, or the folder of a tokenizer")
        given = tokenizer.encode(cast(str, text), add_special_tokens=add_special_tokens, max_length=max_length)
    token_ids = check_token_ids(given[:max_length], vocab_size)
    if not token_ids:
        raise InputError("the prompt has no tokens; give a prompt that is not empty")
    return text, token_ids


def check_prompt_length(length: int, limit: int | None) -> None:
    """Raises ContextLengthError, in the vendor's words, for a prompt of more than `limit` tokens."""
    if limit is not None and length > limit:
        raise ContextLengthError(
            f"This model's maximum input context length is {limit} tokens, however you requested {length} "
            f"tokens. Please reduce your prompt."
        )


def with_tokenizer_kwargs(prompt: Prompt, options: Mapping[str, Any] | None, tokenizer: Tokenizer | None) -> Prompt:
    """`prompt` with the tokens that the vendor's `tokenizer_kwargs` ask for; only `add_special_tokens` is known."""
    if not options:
        return prompt
    unknown = sorted(str(name) for name in options if name != "add_special_tokens")
    if unknown or not isinstance(options["add_special_tokens"], bool):
        raise UnsupportedError(
            f"tokenizer_kwargs={dict(options)!r:.80} are not supported, only add_special_tokens=True or False is; "
            f"give prompt_token_ids instead"
        )
    text, token_ids = read_prompt(prompt, tokenizer, None, add_special_tokens=options["add_special_tokens"])
    return {"prompt": text, "prompt_token_ids": token_ids}


def check_token_ids(token_ids: Sequence[object], vocab_size: int | None) -> list[int]:
    """`token_ids` as a list of ints; raises InputError unless a model of `vocab_size` tokens has all of them."""
    limit = _MAX_TOKENS if vocab_size is None else vocab_size
    if _are_ints(token_ids) and 0 <= min(token_ids) <= max(token_ids) < limit:
        return list(token_ids)
    checked = []
    for position, token in enumerate(token_ids):
        if not _is_id(token):
            raise InputError(
                f"prompt_token_ids[{position}] is {token!r:.80} of type {type(token).__name__}, expected an integer"
            )
        number = int(cast(int, token))
        if not 0 <= number < limit:
            raise InputError(
                f"prompt_token_ids[{position}] is {number!r:.80}, but the model's tokens are 0 to {limit - 1}"
            )
        checked.append(number)
    return checked


def _parts(prompt: Prompt) -> tuple[str | None, Sequence[object] | None]:
    """Text and token ids of a prompt, at least one of them; raises InputError for anything else."""
    if isinstance(prompt, str):
        return prompt, None
    if _is_ids(prompt):
        return None, cast(Sequence[int], prompt)
    if not isinstance(prompt, Mapping):
        raise InputError(
            f"Unsupported prompt type: {type(prompt).__name__} {prompt!r:.80}; give a str, a list of token ids, "
            f"{{'prompt': str}} or {{'prompt_token_ids': [int, ...]}}"
        )
    unknown = sorted(str(key) for key in prompt if key not in _KEYS)
    text, token_ids = (prompt.get(key) for key in _KEYS)
    if unknown or (text is None and token_ids is None):
        found = ", ".join(map(repr, unknown)) or "neither"
        raise InputError(f"Unsupported prompt type: found {found:.200}, expected 'prompt' or 'prompt_token_ids'")
    if text is not None and not isinstance(text, str):
        raise InputError(f"Unsupported prompt type: 'prompt' is a {type(text).__name__}, expected a str")
    if token_ids is not None and not _is_row(token_ids):
        raise InputError(
            f"Unsupported prompt type: 'prompt_token_ids' is a {type(token_ids).__name__}, expected a list of integers"
        )
    return text, token_ids


def _is_ids(value: object) -> bool:
    return _is_row(value) and (_are_ints(value) or all(map(_is_id, cast(Sequence[object], value))))


def _are_ints(value: object) -> TypeGuard[Sequence[int]]:
    """Whether it is a list of nothing but Python's integers, as most are; in a tenth of the time of other checks."""
    return isinstance(value, list) and set(map(type, value)) == {int}


def _is_row(value: object) -> bool:
    """Whether it is a sequence of anything but characters."""
    if isinstance(value, np.ndarray):
        return value.ndim == 1
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray)


def _is_id(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
