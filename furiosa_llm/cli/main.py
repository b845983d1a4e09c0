"""`furiosa-llm`: the entry point, and how its errors are shown."""

from __future__ import annotations

import gc
import importlib

import click

from furiosa_llm.cli.exit_code import end, exit_code_of

_SUMMARIES = {
    "bench": "Measure throughput, latency and goodput of an artifact.",
    "build": "Split an ONNX model over PEs, and write the artifact.",
    "check-sharding": "Check the multi-device annotations of an ONNX model.",
    "diff": "Say in what two artifacts differ.",
    "embed": "Turn texts into vectors with an encoder.",
    "example-model": "Fetch a real model to try the rest on.",
    "generate": "Complete a prompt with a decoder.",
    "inspect": "Show what an artifact holds, and where it comes from.",
    "plan": "Say how a model would be split, at what cost, where it fits.",
    "reshard": "Write an artifact for another number of PEs.",
    "run": "Run an artifact once, on whole tensors.",
    "serve": "Serve an artifact at an OpenAI-compatible interface.",
    "sign": "Sign an artifact.",
    "simulate": "Say how fast a model will be on cards that are not here.",
    "topology": "Show what an artifact puts on which PE.",
    "unbuild": "Turn an artifact back into the ONNX model.",
    "verify": "Check an artifact, by itself and against its model.",
}
"""What each command does. `NAME` is in the file NAME.py, under the same name."""
_OBJECTS_BETWEEN_COLLECTIONS = 100_000
"""A graph is hundreds of thousands of objects that live to the end; looking for cycles among them every 700 new ones,
Python's default, takes a quarter of the planning time."""


class _Commands(click.Group):
    """A group whose commands are imported when they are invoked: help and completion need only their summaries."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that `args` begin with, imported."""
        name, known, rest = super().resolve_command(ctx, args)
        return name, None if known is None else command_of(str(known.name)), rest


def command_of(name: str) -> click.Command:
    """The command `name`, imported."""
    attribute = name.replace("-", "_")
    found: click.Command = getattr(importlib.import_module(f"furiosa_llm.cli.{attribute}"), attribute)
    return found


@click.group(
    cls=_Commands,
    commands=[click.Command(name, short_help=summary) for name, summary in _SUMMARIES.items()],
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(
    None,
    "-V",
    "--version",
    package_name="furiosa-llm-onnx",
    prog_name="furiosa-llm",
    message="%(prog)s %(version)s",
)
def cli() -> None:
    """Split an ONNX transformer over simulated processing elements (PEs), and run it."""


def main() -> None:
    """Run the command line; see `exit_code_of` and `end`."""
    gc.set_threshold(_OBJECTS_BETWEEN_COLLECTIONS)
    end(exit_code_of(cli))
