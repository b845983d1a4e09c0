"""`furiosa-llm reshard`: the artifact for another tensor parallel size, without the model."""

from __future__ import annotations

from pathlib import Path

import click

from furiosa_llm.builder import reshard as make
from furiosa_llm.cli.build import WORKERS, print_report, shown_progress
from furiosa_llm.cli.options import parallel_size


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
@parallel_size(
    "tp",
    "tensor",
    type=int,
    required=True,
    help="How many PEs are to share each matrix: 4 or 8.",
)
@click.option("--experimental-tp", is_flag=True, help="Also allow a tensor parallel size of 1, 2 or 16.")
@WORKERS
@click.option("--force", is_flag=True, help="Replace OUTPUT if it is an artifact already.")
def reshard(
    artifact: Path, output: Path, tensor_parallel_size: int, experimental_tp: bool, workers: int | None, force: bool
) -> None:
    """Write to OUTPUT what a build of the model behind ARTIFACT gives for another tensor parallel size.

    The model is not needed: its weights are put together from the artifact's shards, and each is compared with the
    digest that the first build recorded. The result is the same, byte for byte, as a fresh build's with this release.
    """
    with shown_progress() as told:
        report = make(
            artifact,
            output,
            tensor_parallel_size=tensor_parallel_size,
            experimental_tp=experimental_tp,
            force=force,
            progress=told,
            workers=workers,
        )
    print_report(report)
