"""Checks of single sampling parameters: types as well as ranges, each refusal with the value that was found."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any

from furiosa_llm.runtime.errors import SamplingParamsError

_MAX_ENTRIES = 1024
"""Greatest length of a list of stop strings, words or tokens: each of them costs time at every token."""

_MAX_CHARACTERS = 4096
"""Greatest length of a stop string or of a word."""


def require(condition: bool, message: str) -> None:
    """Raises SamplingParamsError with `message` if `condition` does not hold."""
    if not condition:
        raise SamplingParamsError(message)


def integer(name: str, value: Any) -> int:
    """`value` as an int of at most 64 bits; True, 1.0 and "1" are refused."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise _refusal(name, "an integer", value)
    if abs(int(value)) >= 2**64:
        raise _refusal(name, "less than 2**64", value)
    return int(value)


def number(name: str, value: Any) -> float:
    """`value` as a float, which may be infinite or no number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise _refusal(name, "a number", value)
    try:
        return float(value)
    except OverflowError:
        return math.inf


def number_in(name: str, value: Any, allowed: Callable[[float], bool], words: str) -> float:
    """`value` as a finite float that is `allowed`; `words` say what is."""
    found = number(name, value)
    if not allowed(found):
        raise _refusal(name, words, value)
    if not math.isfinite(found):
        raise _refusal(name, "finite", value)
    return found


def flag(name: str, value: Any) -> None:
    """Raises SamplingParamsError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise _refusal(name, "True or False", value)


def strings(name: str, value: Any) -> tuple[str, ...]:
    """`value`, a list or tuple of strings that are neither empty nor without measure."""
    found = _entries(name, value, "strings")
    for entry in found:
        if not isinstance(entry, str):
            raise _refusal(name, "a list of strings", value)
        require(entry != "", f"{name} must not hold an empty string.")
        require(
            len(entry) <= _MAX_CHARACTERS,
            f"{name} must hold strings of at most {_MAX_CHARACTERS} characters, got one of {len(entry)}.",
        )
    return found


def token_ids(name: str, value: Any) -> tuple[int, ...]:
    """`value`, a list or tuple of token ids, as a tuple of ints."""
    return tuple(_token_id(name, entry) for entry in _entries(name, value, "token ids"))


def biases(name: str, value: Any) -> dict[int, float]:
    """`value`, a mapping of token ids to numbers in [-100, 100], as a dict."""
    if not isinstance(value, Mapping):
        raise _refusal(name, "a mapping of token ids to numbers", value)
    require(len(value) <= _MAX_ENTRIES, f"{name} must hold at most {_MAX_ENTRIES} entries, got {len(value)}.")
    return {
        _token_id(name, token): number_in(
            f"{name}[{token}]", bias, lambda found: -100.0 <= found <= 100.0, "in [-100, 100]"
        )
        for token, bias in value.items()
    }


def _token_id(name: str, value: Any) -> int:
    token = integer(f"{name}: a token id", value)
    require(token >= 0, f"{name}: a token id must be non-negative, got {token}.")
    return token


def _entries(name: str, value: Any, what: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise _refusal(name, f"a list of {what}", value)
    require(len(value) <= _MAX_ENTRIES, f"{name} must hold at most {_MAX_ENTRIES} {what}, got {len(value)}.")
    return tuple(value)


def _refusal(name: str, words: str, value: Any) -> SamplingParamsError:
    try:
        found = f"{value!r:.80}"
    except ValueError:  # Python does not write out integers of thousands of digits.
        found = f"a value of type {type(value).__name__} that is too long to write out"
    return SamplingParamsError(f"{name} must be {words}, got {found}.")
