"""A strict reader of untrusted JSON: every value is taken with a type and a range, and errors name its JSON path."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any, NoReturn, TypeVar

from furiosa_llm.runtime.artifact.errors import ArtifactError

T = TypeVar("T")

REBUILD = "rebuild the artifact with `furiosa-llm build`"
MAX_COMPANION_NBYTES = 2**28
"""Of a file that came with the model, such as a tokenizer: those of 256,000 words take a tenth."""
MAX_INTEGER = 2**62
MAX_DEPTH = 32
"""Levels of objects and lists whose members no format names."""
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class Field:
    """One value of a document and where it is: the document's name and a JSON path (`manifest.json $.tensors[3]`)."""

    __slots__ = ("_key", "_parent", "value")

    def __init__(self, value: Any, parent: Field | str, key: str | int = "") -> None:
        """The value at `key` of `parent`, or the value of a whole document with the name `parent`.

        A manifest has tens of thousands of values, and the path of one is asked for if it is wrong.
        """
        self.value = value
        self._parent = parent
        self._key = key

    @property
    def path(self) -> str:
        """Where the value is."""
        if isinstance(self._parent, str):
            return self._parent
        return self._parent.path + (f"[{self._key}]" if isinstance(self._key, int) else f".{self._key}")

    def fail(self, expected: str, found: str | None = None) -> NoReturn:
        """Raises ArtifactError that names the path, what was found and what was expected."""
        shown = _shown(self.value) if found is None else found
        raise ArtifactError(f"{self.path}: found {shown}, expected {expected}; {REBUILD}")

    def child(self, *keys: str | int) -> Field:
        """The value below this one at `keys`, which must be there."""
        field = self
        for key in keys:
            field = Field(field.value[key], field, key)
        return field

    def members(self, keys: Collection[str], may: Collection[str] = ()) -> dict[str, Field]:
        """The members of an object that must have `keys`, and of the others only those that it `may` have, or null."""
        if not isinstance(self.value, dict):
            self.fail(f"an object with the keys {', '.join(keys)}")
        for key in keys:
            if key not in self.value:
                self.fail(f"the key {key!r}", "an object without it")
        for key in self.value:
            if key not in keys and key not in may:
                self.fail(f"only the keys {', '.join((*keys, *may))}", f"the unknown key {key!r:.80}")
        return {key: Field(self.value.get(key), self, key) for key in (*keys, *may)}

    def items(self, read: Callable[[Field], T], *, most: int | None = None) -> tuple[T, ...]:
        """The items of a list, each taken by `read`; at most `most` of them."""
        if not isinstance(self.value, list):
            self.fail("a list")
        if most is not None and len(self.value) > most:
            self.fail(f"a list of at most {most} items", f"{len(self.value)} of them")
        return tuple([read(Field(item, self, index)) for index, item in enumerate(self.value)])

    def optional(self, read: Callable[[Field], T]) -> T | None:
        """None for `null`, else what `read` takes."""
        return None if self.value is None else read(self)

    def text(self) -> str:
        """A string."""
        if not isinstance(self.value, str):
            self.fail("a string")
        return self.value

    def name(self) -> str:
        """A string that is not empty."""
        if not isinstance(self.value, str) or not self.value:
            self.fail("a string that is not empty")
        return self.value

    def integer(self, minimum: int = 0) -> int:
        """An integer of at least `minimum` that fits 62 bits; true, false and 1.0 are not integers."""
        value = self.value
        if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value < MAX_INTEGER:
            self.fail(f"an integer of at least {minimum}")
        return value

    def choice(self, known: Sequence[str]) -> str:
        """One of the strings `known`."""
        if not isinstance(self.value, str) or self.value not in known:
            self.fail(f"one of {', '.join(known)}")
        return self.value

    def mapping(self) -> dict[str, Any]:
        """An object with any members, which are nested at most MAX_DEPTH deep: whoever reads them may recurse."""
        if not isinstance(self.value, dict):
            self.fail("an object")
        level: list[Any] = [self.value]
        for _ in range(MAX_DEPTH):
            members = (value for one in level for value in (one.values() if isinstance(one, dict) else one))
            level = [value for value in members if isinstance(value, dict | list)]
        if level:
            self.fail(f"an object of at most {MAX_DEPTH} levels", "one that is nested deeper")
        return self.value


def parse_json(data: bytes, document: str) -> Field:
    """The root of the UTF-8 JSON `document`, without NaN, infinities or repeated keys; raises ArtifactError."""
    try:
        text = data.decode("utf-8")
        root = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite)
        if _SURROGATE.search(data):
            # An escaped half of a pair is no character, and no name with one can be shown or opened.
            json.dumps(root, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ArtifactError(f"{document} is nested too deeply; {REBUILD}") from error
    except ValueError as error:
        raise ArtifactError(f"{document} is not whole UTF-8 JSON: {error}; {REBUILD}") from error
    return Field(root, f"{document} $")


def check_unique(fields: Field, names: Sequence[str], what: str) -> None:
    """Raises ArtifactError naming the first repeated one of `names`, taken from the list `fields`."""
    seen: dict[str, int] = {}
    for index, name in enumerate(names):
        if name in seen:
            taken = f"item {seen[name]} of the list"
            fields.child(index).fail(f"{what} that {taken} has not taken already", f"{name!r:.80} again")
        seen[name] = index


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        repeated, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"an object has the key {repeated!r:.80} more than once")
    return members


def _finite(digits: str) -> float:
    number = float(digits)
    return number if math.isfinite(number) else _no_constant(digits)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"found the number {name}, expected finite numbers")


def _shown(value: Any) -> str:
    kinds: dict[type, str] = {dict: "an object", list: "a list", type(None): "null"}
    return kinds[type(value)] if type(value) in kinds else f"{json.dumps(value):.80}"
