"""What an option takes and what it is for: said once, with its field, for checks, command lines and tables in docs.

Builds and engines have options, and a manifest records a build's.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from typing import Any, get_type_hints

from furiosa_llm.runtime.artifact.json_reader import MAX_INTEGER


@dataclasses.dataclass(frozen=True, slots=True)
class Kind:
    """The values that an option takes."""

    expected: str
    """In words, for refusals."""
    accepts: Callable[[Any], bool]
    parse: Callable[[str], Any] = str
    """The value of a text on a command line; raises ValueError if it stands for none."""

    def check(self, name: str, value: object, error: type[Exception]) -> None:
        """Raises `error` unless the option `name` takes `value`."""
        if not self.accepts(value):
            raise error(f"{name} must be {self.expected}, got {value!r:.80}")


@dataclasses.dataclass(frozen=True, slots=True)
class Option:
    """What is known of an option apart from its field's name, type and default: `Annotated[int, Option(...)]`."""

    help: str
    kind: Kind
    none: str = ""
    """What None, the default, stands for."""
    unit: str = ""
    """Of a number: "s", or "B" for bytes."""
    default: Any = None
    """The field's, which `declared` fills in."""

    def takes(self, value: object) -> bool:
        """Whether it may have `value`: None only where that is the default."""
        return (value is None and self.default is None) or self.kind.accepts(value)

    @property
    def default_text(self) -> str:
        """The default, for people; empty if there is nothing to say."""
        if self.default in (None, dataclasses.MISSING, {}):
            return self.none
        if isinstance(self.default, bool):
            return "on" if self.default else "off"
        if self.unit == "B":
            return f"{self.default / 2**20:g} MiB"
        number = f"{self.default:g}" if isinstance(self.default, float) else str(self.default)
        return f"{number} {self.unit}".rstrip()

    @property
    def help_text(self) -> str:
        """The help with the default, unless there is nothing to say of it."""
        said = self.default is not False and self.default_text
        return f"{self.help}  [default: {said}]" if said else self.help


def is_whole(value: object) -> bool:
    """Whether `value` is an integer, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether `value` is an integer or a float, and no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def instance(expected: str, *types: type) -> Kind:
    """Objects of `types`."""
    return Kind(expected, lambda value: isinstance(value, types))


INTEGER = Kind("an integer", is_whole, int)
COUNT = Kind("an integer of at least 1", lambda value: is_whole(value) and 1 <= value <= MAX_INTEGER, int)
"""And no greater than a manifest's integers, which nobody means."""
COUNT_OR_NONE = Kind("an integer of at least 0", lambda value: is_whole(value) and 0 <= value <= MAX_INTEGER, int)
SEED = Kind("an integer of at least 0 and below 2**64", lambda value: is_whole(value) and 0 <= value < 2**64, int)
SHARE = Kind("a number of at least 0 and below 1", lambda value: is_number(value) and 0 <= value < 1, float)
AT_LEAST_ONE = Kind("a number of at least 1", lambda value: is_number(value) and value >= 1, float)
POSITIVE = Kind("a positive number", lambda value: is_number(value) and value > 0, float)
SWITCH = instance("True or False", bool)
TEXT = instance("a string", str)
PATH = instance("a path", str, os.PathLike)
FLOAT32 = "float32"


def _float32(text: str) -> str:
    if text != FLOAT32:
        raise ValueError
    return text


COMPUTE = Kind('"float32"', lambda value: value == FLOAT32, _float32)


@functools.cache
def declared(config: type) -> Mapping[str, Option]:
    """The options of the dataclass `config`, by the names of its fields, in their order."""
    hints = get_type_hints(config, include_extras=True)
    options = {}
    for field in dataclasses.fields(config):
        for option in getattr(hints[field.name], "__metadata__", ()):
            default = field.default
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            options[field.name] = dataclasses.replace(option, default=default)
    return options


def check_options(config: Any, error: type[Exception]) -> None:
    """Raises `error` for the first field of the dataclass `config` whose option does not take its value."""
    of_class: Any = type(config)
    for name, option in declared(of_class).items():
        if not option.takes(getattr(config, name)):
            option.kind.check(name, getattr(config, name), error)
