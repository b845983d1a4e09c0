"""`furiosa-mlperf`: the entry point, one subcommand for each benchmark."""

from __future__ import annotations

import os
import signal
import sys
import threading
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import click

from furiosa_llm.cli.exit_code import exit_code_of
from furiosa_llm.cli.options import CLUSTER, ENGINE, PLACEMENT, options
from furiosa_llm.mlperf.benchmarks import BENCHMARKS, Benchmark
from furiosa_llm.runtime.errors import UnsupportedError

_NEEDED = {"mlperf_loadgen": "mlcommons-loadgen", "rouge_score": "rouge-score"}
_MODES = ("performance-only", "accuracy-only", "submission")
_OPTIONS = (
    click.option("--user-conf", type=click.Path(path_type=Path), help="LoadGen's settings for this system."),
    click.option(
        "--test-mode", type=click.Choice(_MODES), default=_MODES[0], show_default=True, help="What LoadGen measures."
    ),
    click.option("--dataset", type=click.Path(path_type=Path), help="JSON Lines.  [default: one of the package's]"),
    click.option("--count", type=click.IntRange(min=1), help="The first so many samples.  [default: all]"),
    click.option(
        "--max-output-tokens", type=click.IntRange(min=2), help="Of a completion.  [default: as MLPerf has it]"
    ),
    options(ENGINE, *PLACEMENT, "tokenizer", "max_batch_size", "paged_attention_num_blocks", "npu_queue_limit"),
    options(ENGINE, *CLUSTER, "spare_blocks_ratio", "workers", "threads", "full_verification", "compute"),
)
_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


@click.group(context_settings=_SETTINGS)
@click.version_option(
    None,
    "-V",
    "--version",
    package_name="furiosa-llm-onnx",
    prog_name="furiosa-mlperf",
    message="%(prog)s %(version)s",
)
def cli() -> None:
    """Run an MLPerf Inference benchmark on an artifact, under MLCommons' LoadGen."""


@cli.command("help")
@click.argument("subcommand", required=False)
@click.pass_context
def help_command(context: click.Context, subcommand: str | None) -> None:
    """Show the help of a subcommand, or of all."""
    assert context.parent is not None
    if subcommand is None:
        click.echo(context.parent.get_help())
        return
    command = cli.get_command(context, subcommand)
    if command is None:
        raise click.UsageError(f"No such command {subcommand!r}.", context.parent)
    with click.Context(command, info_name=subcommand, parent=context.parent) as inner:
        click.echo(command.get_help(inner))


def _command(benchmark: Benchmark) -> click.Command:
    @click.argument("artifact", type=click.Path(path_type=Path))
    @click.argument("log_dir", type=click.Path(path_type=Path))
    def callback(**options: Any) -> None:
        _run(benchmark, options)

    decorated: Any = callback
    for option in reversed(_OPTIONS):
        decorated = option(decorated)
    model = {"decoder": "a decoder", "encoder": "an encoder"}[benchmark.task]
    help_text = (
        f"Run ARTIFACT, {model}, in LoadGen's {benchmark.scenario} scenario; logs go into LOG_DIR.\n\n"
        f"LoadGen has its settings of the model key {benchmark.key}, which docs/mlperf.md lists. Needs the "
        f"extra `mlperf`: pip install 'furiosa-llm-onnx[mlperf]'."
    )
    summary = f"Run {model} in the {benchmark.scenario} scenario."
    made: click.Command = click.command(benchmark.command, help=help_text, short_help=summary)(decorated)
    return made


for _benchmark in BENCHMARKS:
    cli.add_command(_command(_benchmark))


def _run(benchmark: Benchmark, options: dict[str, Any]) -> None:
    _check_installed()
    # LoadGen is an extra.
    from furiosa_llm.mlperf.run import RunOptions, run

    not_engine = {name: options.pop(name) for name in _NOT_OF_ENGINE}
    asked = RunOptions(benchmark=benchmark, engine=options, **not_engine)
    run(asked, summary=click.echo, progress=partial(click.echo, err=True))


_NOT_OF_ENGINE = ("artifact", "log_dir", "test_mode", "user_conf", "dataset", "count", "max_output_tokens")


def _check_installed() -> None:
    missing = [package for module, package in _NEEDED.items() if find_spec(module) is None]
    if missing:
        raise UnsupportedError(
            f"furiosa-mlperf needs {', '.join(missing)}, which is not installed; run: "
            f"pip install 'furiosa-llm-onnx[mlperf]'"
        )


def main() -> None:
    """Run the command line; see `exit_code_of`."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    _exit(exit_code_of(cli))


def _exit(code: int) -> NoReturn:
    """Ends the process, without waiting for a test of LoadGen's that goes on with its schedule."""
    sys.stdout.flush()
    sys.stderr.flush()
    if any(thread.name == "loadgen" for thread in threading.enumerate()):
        os._exit(code)
    sys.exit(code)
