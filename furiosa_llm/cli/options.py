"""Options and their types that several commands share."""

from __future__ import annotations

import click


class Sizes(click.ParamType[tuple[str, int]]):
    """`NAME=SIZE`, a positive integer."""

    name = "NAME=SIZE"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, int]:
        """The name and the size."""
        key, _, size = str(value).rpartition("=")
        if not key or not size.isdecimal() or int(size) < 1:
            self.fail(f"{value!r} is not NAME=SIZE with a positive size, for instance height=224", param, ctx)
        return key, int(size)


FULL_VERIFICATION = click.option(
    "--full-verification/--no-full-verification",
    default=None,
    help="Compare the weights with their digests as they are loaded.  [default: below 1 GB]",
)
