"""Options and their types that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

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


ROLE = click.option(
    "--role",
    "roles",
    type=GivenRole(),
    multiple=True,
    help="What an input is for, where the graph does not tell: tokens, mask, positions, token_types, state or other.",
)
FIX = click.option(
    "--fix", "fixed", type=FixedInput(), multiple=True, help="Make an input a constant: one boolean or integer."
)


class BlockCounts(click.ParamType[tuple[int, ...]]):
    """`10,20`: positive integers."""

    name = "N,N,..."

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """The numbers."""
        parts = [part.strip() for part in str(value).split(",")]
        if not all(part.isascii() and part.isdecimal() and int(part) for part in parts):
            self.fail(f"{value!r} is not a list of block counts, for instance 10,20", param, ctx)
        return tuple(map(int, parts))


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


FULL_VERIFICATION = click.option(
    "--full-verification/--no-full-verification",
    default=None,
    help="Compare the weights with their digests as they are loaded.  [default: below 1 GB]",
)

BATCH_INVARIANT = click.option(
    "--batch-invariant",
    is_flag=True,
    help="Give every request the bits that it has alone, whoever else is served; docs/determinism.md has the price.",
)

DEVICES = click.option(
    "--devices",
    help='PEs to simulate: "npu:0,npu:1", "npu:0:*", "npu:0:0-3".  [default: as many as the sizes need]',
)


def parallel_size(
    short: str, kind: str, destination: str | None = None, **options: Any
) -> Callable[[Command], Command]:
    """The option `-tp`, `-pp` or `-dp` under all of its names: `kind` is "tensor", "pipeline" or "data"."""
    names = (f"-{short}", f"--{kind}-parallel-size", f"--{kind}_parallel_size")
    return click.option(*names, destination or f"{kind}_parallel_size", **options)


TENSOR_PARALLEL_SIZE = parallel_size(
    "tp",
    "tensor",
    type=click.IntRange(min=1),
    help="What ARTIFACT has to be split for; another one is refused.  [default: as it is]",
)

PIPELINE_PARALLEL_SIZE = parallel_size(
    "pp",
    "pipeline",
    type=click.IntRange(min=1),
    help="Pipeline stages, each on a later card than the one before.  [default: 1]",
)

DATA_PARALLEL_SIZE = parallel_size(
    "dp",
    "data",
    type=click.IntRange(min=1),
    help="Replicas of the model.  [default: as many as the devices have PEs for]",
)

NUM_BLOCKS_PER_PP_STAGE = click.option(
    "--num-blocks-per-pp-stage",
    type=BlockCounts(),
    help="Blocks of each pipeline stage, instead of -pp, which balances them.",
)

ALLOW_SUBSET = click.option(
    "--allow-subset", is_flag=True, help="Use the first PEs of the devices if the sizes need fewer."
)


def placement_options(command: Command) -> Command:
    """Adds the options that place one artifact on PEs: `EngineArgs` has fields of their names."""
    for option in (
        ALLOW_SUBSET,
        NUM_BLOCKS_PER_PP_STAGE,
        DATA_PARALLEL_SIZE,
        PIPELINE_PARALLEL_SIZE,
        TENSOR_PARALLEL_SIZE,
        DEVICES,
    ):
        command = option(command)
    return command
