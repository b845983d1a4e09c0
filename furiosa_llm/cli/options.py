"""Options and their types that several commands share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from furiosa_llm.runtime.artifact.options import AT_LEAST_ONE, COUNT, PATH, POSITIVE, SEED, SHARE, SWITCH, Kind, Option
from furiosa_llm.runtime.artifact.progress import shown, tell
from furiosa_llm.runtime.engine.engine_args import BLOCK_COUNTS, TOKENIZER, engine_options

Command = TypeVar("Command", bound=Callable[..., Any])


class Sizes(click.ParamType[tuple[str, int]]):
    """`NAME=SIZE`, a positive integer."""

    name = "NAME=SIZE"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, int]:
        """The name and the size."""
        key, _, size = str(value).rpartition("=")
        if not key or not size.isdecimal() or int(size) < 1:
            self.fail(f"{value!r} is not NAME=SIZE with a positive size, for instance height=224", param, ctx)
        return key, int(size)


class FixedInput(click.ParamType[tuple[str, int]]):
    """`INPUT=VALUE`: a boolean or an integer."""

    name = "INPUT=VALUE"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, int]:
        """The input's name and its value."""
        key, _, text = str(value).rpartition("=")
        number = {"true": 1, "false": 0}.get(text.lower(), int(text) if text.removeprefix("-").isdecimal() else None)
        if not key or number is None:
            self.fail(f"{value!r} is not INPUT=VALUE, for instance use_cache_branch=true", param, ctx)
        return key, number


class GivenRole(click.ParamType[tuple[str, str]]):
    """`INPUT=ROLE`, or `INPUT=ROLE[DIM,...]`."""

    name = "INPUT=ROLE"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        """The input's name and its role."""
        key, _, text = str(value).partition("=")
        if not key or not text:
            self.fail(f"{value!r} is not INPUT=ROLE, for instance pos=positions[3,batch,sequence]", param, ctx)
        return key, text


class NamedPath(click.ParamType[tuple[str, Path]]):
    """`NAME=PATH`."""

    name = "NAME=PATH"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Path]:
        """The name and the path."""
        key, _, path = str(value).partition("=")
        if not key or not path:
            self.fail(f"{value!r} is not NAME=PATH, for instance sql=adapters/sql", param, ctx)
        return key, Path(path)


class Numbers(click.ParamType[tuple[float, ...]]):
    """`1,2,4`: positive numbers, of the type `kind`; among floats there is `inf`."""

    name = "N,..."

    def __init__(self, kind: type[int] | type[float]) -> None:
        self._kind = kind

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        """The numbers."""
        try:
            found = tuple(self._kind(part) for part in str(value).split(","))
        except ValueError:
            found = ()
        if not found or not all(number > 0 for number in found):
            self.fail(f"{value!r} is not a list of positive numbers, for instance 1,2,4", param, ctx)
        return found


class _Declared(click.Option):
    """An option that refuses values in the words of Python."""

    def __init__(self, *args: Any, kind: Kind, **options: Any) -> None:
        super().__init__(*args, **options)
        self._kind = kind

    def type_cast_value(self, ctx: click.Context, value: Any) -> Any:
        """The value, or a refusal."""
        try:
            return super().type_cast_value(ctx, value)
        except click.BadParameter as error:
            raise click.BadParameter(f"must be {self._kind.expected}, got {value}", ctx, self) from error


_TYPES: Mapping[Kind, Any] = {
    COUNT: click.IntRange(min=1),
    SEED: click.IntRange(min=0),
    SHARE: click.FloatRange(0, 1, max_open=True),
    AT_LEAST_ONE: click.FloatRange(min=1),
    POSITIVE: click.FloatRange(min=0, min_open=True),
    PATH: click.Path(path_type=Path),
    TOKENIZER: click.Path(path_type=Path),
}
"""The types of click that say more in the help than a function that parses."""
_SHORT = {"tensor_parallel_size": "-tp", "pipeline_parallel_size": "-pp", "data_parallel_size": "-dp"}


def option(name: str, declared: Mapping[str, Option], *spellings: str, **changes: Any) -> Callable[[Command], Command]:
    """The option `name`, as `declared`.

    `spellings` take the place of the ones that follow from the name; `changes` are for `click.option`.
    """
    known = declared[name]
    settings: dict[str, Any] = {
        "default": known.default,
        "help": known.help if "default" in changes else known.help_text,
        "metavar": "N,N,..." if known.kind is BLOCK_COUNTS else None,
    }
    dashed = f"--{name.replace('_', '-')}"
    names = [dashed]
    if name in _SHORT:
        names = [_SHORT[name], dashed, f"--{name}"]
    if known.kind is SWITCH and known.default is False:
        settings["is_flag"] = True
    elif known.kind is SWITCH:
        names = [f"{dashed}/--no-{name.replace('_', '-')}"]
    elif "type" not in changes:
        settings |= {"type": _TYPES.get(known.kind, known.kind.parse), "cls": _Declared, "kind": known.kind}
    return click.option(*(spellings or names), name, **(settings | changes))


def options(declared: Mapping[str, Option], *names: str) -> Callable[[Command], Command]:
    """The options `names`, as `declared`, in this order."""

    def decorate(command: Command) -> Command:
        for name in reversed(names):
            command = option(name, declared)(command)
        return command

    return decorate


PROGRESS = click.option(
    "--progress/--no-progress", default=None, help="Show on standard error what is done.  [default: on a terminal]"
)


@contextlib.contextmanager
def working(progress: bool | None = None) -> Iterator[None]:
    """Shows what is done inside from the start: what commands import takes a second, too."""
    with shown(progress):
        tell("starting")
        yield


ENGINE = engine_options()
CLUSTER = ("distributed_executor_backend", "ray_address", "placement_timeout", "artifact_cache")
"""The options of stages on other hosts."""
PLACEMENT = (
    *("devices", "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"),
    *("num_blocks_per_pp_stage", "allow_subset"),
)
"""The options that place one artifact on PEs."""
