"""`furiosa-llm reshard`: the artifact for another tensor parallel size, without the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from furiosa_llm.cli.build import BUILD, EXPERIMENTAL_TP, WORKERS, print_report
from furiosa_llm.cli.command import command
from furiosa_llm.cli.options import PROGRESS, option, working
from furiosa_llm.cli.output import JSON


@command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
@option("tensor_parallel_size", BUILD, default=None, required=True)
@EXPERIMENTAL_TP
@WORKERS
@click.option("--force", is_flag=True, help="Replace OUTPUT if it is an artifact already.")
@JSON
@PROGRESS
def reshard(artifact: Path, output: Path, as_json: bool, progress: bool | None, **options: Any) -> None:
    """Write to OUTPUT what a build of the model that ARTIFACT was built from gives for another tensor parallel size.

    The model is not needed: its weights are put together from the artifact's shards, and each is compared with the
    digest that the first build recorded. The result is the same, byte for byte, as a fresh build's with this release.
    """
    with working(progress):
        from furiosa_llm.builder import reshard as make

        report = make(artifact, output, **options)
    print_report(report, as_json=as_json)
