"""Bodies as JSON, and what is counted in them before any model of pydantic sees them."""

from __future__ import annotations

import json
from typing import Any

from furiosa_llm.runtime.errors import InputError

MAX_DEPTH = 100
"""Of objects and lists within each other."""
MAX_VALUES = 2**16
"""All values of a body, but for integers in lists of integers."""
MAX_NUMBERS = 300_000
"""Integers in lists of nothing else: prompts as token ids."""
MAX_NAMES = 2**13
"""Of one object."""
MAX_PARTS = 2**12
"""Of all messages: what their content is divided into, and themselves."""
MAX_LENGTHS = {"messages": 4096, "tools": 1024, "logit_bias": 1024}
"""Fields of a body that cost more than their values."""


def read_body(body: bytes) -> Any:
    """What `body` says; raises InputError for what is no JSON, and for more of anything than is taken."""
    try:
        found = json.loads(body)
    except json.JSONDecodeError as error:
        raise InputError(f"the body is not valid JSON: {error.msg}") from error
    except ValueError as error:  # bytes that are no text, and integers of thousands of digits
        raise InputError(f"the body is not valid JSON: {str(error)[:200]}") from error
    except RecursionError:
        raise _too_deep() from None
    if isinstance(found, dict):
        for name, limit in MAX_LENGTHS.items():
            _check(name, _length(found.get(name)), limit)
        messages = found.get("messages")
        if isinstance(messages, list):
            parts = sum(1 + _length(one.get("content")) for one in messages if isinstance(one, dict))
            _check("messages with the parts of their content", parts, MAX_PARTS)
    _check_counts(found)
    return found


def _length(value: Any) -> int:
    return len(value) if isinstance(value, list | dict) else 0


def _check(what: str, count: int, limit: int) -> None:
    if count > limit:
        raise InputError(f"{what}: found {count} entries, at most {limit} are taken; send fewer")


def _check_counts(found: Any) -> None:
    """Raises InputError if there are too many values, or one is too deep; level by level, so that none recurses."""
    level, depth, values, numbers = [found], 0, 1, 0
    while level:
        below: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                _check("an object of the body", len(one), MAX_NAMES)
                below.extend(one.values())
            elif isinstance(one, list):
                if {int}.issuperset(map(type, one)):
                    numbers += len(one)
                else:
                    below.extend(one)
        values += len(below)
        depth += 1
        _check("the values of the body", values, MAX_VALUES)
        _check("the token ids of the body", numbers, MAX_NUMBERS)
        if depth > MAX_DEPTH and below:
            raise _too_deep()
        level = below


def _too_deep() -> InputError:
    return InputError(f"the body holds objects or lists more than {MAX_DEPTH} levels deep, which is the limit")
