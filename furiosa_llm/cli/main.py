"""`furiosa-llm`: the entry point, and how its errors are shown."""

from __future__ import annotations

import gc

import click

from furiosa_llm import __version__
from furiosa_llm.cli.bench import bench
from furiosa_llm.cli.build import build
from furiosa_llm.cli.check_sharding import check_sharding_command
from furiosa_llm.cli.diff import diff
from furiosa_llm.cli.embed import embed
from furiosa_llm.cli.exit_code import end, exit_code_of
from furiosa_llm.cli.generate import generate
from furiosa_llm.cli.inspect import inspect
from furiosa_llm.cli.plan import plan
from furiosa_llm.cli.reshard import reshard
from furiosa_llm.cli.run import run
from furiosa_llm.cli.serve import serve
from furiosa_llm.cli.sign import sign
from furiosa_llm.cli.topology import topology
from furiosa_llm.cli.unbuild import unbuild
from furiosa_llm.cli.verify import verify

_OBJECTS_BETWEEN_COLLECTIONS = 100_000
"""A graph is hundreds of thousands of objects that live to the end; looking for cycles among them every 700 new ones,
Python's default, takes a quarter of the planning time."""


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, "-V", "--version", prog_name="furiosa-llm", message="%(prog)s %(version)s")
def cli() -> None:
    """Split an ONNX transformer over simulated processing elements (PEs), and run it."""


_COMMANDS = (
    bench,
    build,
    check_sharding_command,
    diff,
    embed,
    generate,
    inspect,
    plan,
    reshard,
    run,
    serve,
    sign,
    topology,
    unbuild,
    verify,
)
for command in _COMMANDS:
    cli.add_command(command)


def main() -> None:
    """Run the command line; see `exit_code_of` and `end`."""
    gc.set_threshold(_OBJECTS_BETWEEN_COLLECTIONS)
    end(exit_code_of(cli))
