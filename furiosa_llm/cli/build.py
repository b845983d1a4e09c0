"""`furiosa-llm build`: an ONNX model in, an artifact out, with progress and a closing table."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource
from rich.text import Text

from furiosa_llm.builder.errors import OptionError
from furiosa_llm.builder.options import BuildOptions
from furiosa_llm.builder.plan.tactics import read_tactics
from furiosa_llm.builder.source.folder import default_name
from furiosa_llm.cli.command import command
from furiosa_llm.cli.options import PROGRESS, Command, FixedInput, GivenRole, NamedPath, Sizes, option, working
from furiosa_llm.cli.output import JSON, echo_json
from furiosa_llm.cli.terminal import Console, line
from furiosa_llm.runtime.artifact.options import declared

if TYPE_CHECKING:
    from furiosa_llm.builder import BuildReport

BUILD = declared(BuildOptions)
EXPERIMENTAL_TP = click.option(
    "--experimental-tp", is_flag=True, help="Also allow a tensor parallel size of 1, 2 or 16."
)
WORKERS = click.option(
    "--workers",
    type=int,
    help="Threads that read, cut, hash and write weights, 1 to 5; the bytes do not depend on it.  [default: 5]",
)


def planning_options(command: Command) -> Command:
    """Adds the options that a plan depends on, whatever the size: `BuildOptions` and `plan_model` have them all."""
    for add in (
        option("fuse_attention", BUILD),
        EXPERIMENTAL_TP,
        option(
            "tactics",
            BUILD,
            type=click.Path(path_type=Path),
            callback=lambda _, __, path: None if path is None else read_tactics(path),
        ),
        option("max_padding", BUILD),
        option("fixed", BUILD, "--fix", type=FixedInput(), multiple=True, callback=lambda _, __, given: dict(given)),
        option("roles", BUILD, "--role", type=GivenRole(), multiple=True, callback=lambda _, __, given: dict(given)),
        option("dims", BUILD, "--dim", type=Sizes(), multiple=True, callback=lambda _, __, sizes: dict(sizes)),
        click.option(
            "--lora",
            type=NamedPath(),
            multiple=True,
            callback=lambda _, __, given: dict(given),
            help="An adapter that goes into the artifact: PEFT's folder, or a .safetensors file. The graph gets inputs "
            "for it if it has none; repeatable.",
        ),
    ):
        command = add(command)
    return command


@command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path), required=False)
@option("tensor_parallel_size", BUILD)
@click.option("--name", default="", help="The artifact's name.  [default: from the model's path]")
@option("max_seq_len_to_capture", BUILD)
@planning_options
@click.option(
    "--reuse-plan",
    type=click.Path(path_type=Path),
    help="An artifact of the same graph with other weights: its options and plan are taken, nothing is planned.",
)
@WORKERS
@click.option("--force", is_flag=True, help="Replace OUTPUT if it is an artifact already.")
@click.option(
    "--allow-no-kernel",
    "--plan-only",
    is_flag=True,
    help="Write what has no kernels on this machine, even if --compute float32 does not help.",
)
@JSON
@PROGRESS
@click.pass_context
def build(
    context: click.Context,
    /,
    model: Path,
    output: Path | None,
    name: str,
    reuse_plan: Path | None,
    workers: int | None,
    force: bool,
    allow_no_kernel: bool,
    as_json: bool,
    progress: bool | None,
    **options: Any,
) -> None:
    """Partition MODEL (an .onnx file, or its folder) for tensor parallelism and write the artifact folder OUTPUT.

    A folder with an encoder's file and its decoder's (as encoder_model.onnx, decoder_model.onnx,
    decoder_with_past_model.onnx) becomes one artifact of both.

    A folder is one as exporters leave it: the model lies in it or in its folder `onnx`, configuration and tokenizer
    beside it or one up; of several variants it is model.onnx, or the one whose path is given.

    OUTPUT defaults to a folder in the current one, named after the model and the tensor parallel size.
    """
    if reuse_plan is not None:
        _refuse_beside_a_plan(context, options)
    with working(progress):
        from furiosa_llm.builder import ArtifactBuilder, build_by_plan_of

        if reuse_plan is not None:
            destination = output or Path(f"{default_name(model)}.artifact")
            report = build_by_plan_of(
                reuse_plan,
                model,
                destination,
                name=name,
                force=force,
                workers=workers,
                allow_no_kernel=allow_no_kernel,
            )
        else:
            builder = ArtifactBuilder(model, name, **options)
            destination = output or default_output(model, options["tensor_parallel_size"])
            report = builder.build(destination, force=force, workers=workers, allow_no_kernel=allow_no_kernel)
    print_report(report, as_json=as_json)


def _refuse_beside_a_plan(context: click.Context, options: Iterable[str]) -> None:
    """Raises OptionError if one of `options`, which are taken from the artifact whose plan is reused, is given."""
    given = [name for name in options if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    if given:
        spelling = "--" + given[0].replace("_", "-")
        raise OptionError(
            f"{spelling} does not go with --reuse-plan, which takes the artifact's own options; leave it out."
        )


def default_output(model: Path, tensor_parallel_size: int) -> Path:
    """The output folder's name, after the model."""
    return Path(f"{default_name(model)}-tp{tensor_parallel_size}.artifact")


def print_report(report: BuildReport, *, as_json: bool) -> None:
    """The closing table, one for each part of a composite artifact, and the closing line; or all of it as JSON."""
    if as_json:
        echo_json(dataclasses.asdict(report))
        return
    for one in report.shown():
        if isinstance(one, Text):
            line(one.plain)
        else:
            Console().print(one, crop=False)
    for warning in report.warnings:
        line(f"warning: {warning}", err=True)
    line("Artifact Build Completed")
