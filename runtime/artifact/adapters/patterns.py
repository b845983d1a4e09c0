"""Names of modules by the regular expressions of adapter_config.json, which are foreign: none takes long.

Python's own may take twice as long for each further character of a name, and nothing else runs meanwhile.
"""

from __future__ import annotations

import re
from collections.abc import Set as AbstractSet

MAX_LENGTH = 256
"""Of an expression, and of a name."""
_PLAIN = re.compile(r"\^?[\w.\-]+\$?")
_PART = re.compile(r"(\\[.\-_dw]|\[\^?[\w.\-]+\]|[\w.\-])([*+?]?)")
_ENDLESS = ("*", "+")

_Part = tuple[re.Pattern[str], str]
"""What one character may be, and how often it comes: "", "?", "*" or "+"."""


class NamePattern:
    """An expression for the end of a name, that begins behind a dot or at its beginning.

    It may have characters, classes of them, `*`, `+` and `?` behind one, `|`, and `^` and `$` at its ends. Raises
    ValueError for groups and whatever else.
    """

    def __init__(self, key: str) -> None:
        if not 0 < len(key) <= MAX_LENGTH:
            raise ValueError(f"has {len(key)} characters, expected 1 to {MAX_LENGTH}")
        self._plain = re.compile(rf"(.*\.)?({key})") if _PLAIN.fullmatch(key) else None
        self._ways = [] if self._plain is not None else [_parts(way) for way in key.split("|")]

    @property
    def is_plain(self) -> bool:
        """Whether it is a name, in which a dot may be any character."""
        return self._plain is not None

    def matches(self, name: str) -> bool:
        """Whether it is a name of at most MAX_LENGTH characters that ends so."""
        if len(name) > MAX_LENGTH:
            return False
        if self._plain is not None:
            return self._plain.fullmatch(name) is not None
        return any(_matches(parts, name, first) for parts, first in self._ways)


def _parts(way: str) -> tuple[list[_Part], bool]:
    """The characters of an alternative, and whether they are at the beginning of the name."""
    text = way.removeprefix("^").removesuffix("$")
    found: list[_Part] = []
    at = 0
    while at < len(text):
        part = _PART.match(text, at)
        if part is None:
            raise ValueError(f"has {text[at : at + 20]!r}, expected names, classes of characters, and *, + or ? behind")
        found.append((re.compile(part[1]), part[2]))
        at = part.end()
    return found, way.startswith("^")


def _matches(parts: list[_Part], name: str, first: bool) -> bool:
    """Follows all ways through the parts at once: as long as the name, times the parts."""
    here: AbstractSet[int] = set()
    for at in range(len(name) + 1):
        if at == 0 or (name[at - 1] == "." and not first):
            here = {*here, 0}
        here = _with_skipped(parts, here)
        if at == len(name):
            break
        taken = [place for place in here if place < len(parts) and parts[place][0].fullmatch(name[at])]
        here = {place + 1 for place in taken} | {place for place in taken if parts[place][1] in _ENDLESS}
    return len(parts) in here


def _with_skipped(parts: list[_Part], here: AbstractSet[int]) -> set[int]:
    found = set(here)
    for place, (_, times) in enumerate(parts):
        if place in found and times in ("*", "?"):
            found.add(place + 1)
    return found
