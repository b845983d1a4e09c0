"""`furiosa-llm unbuild`: an artifact back into the ONNX model that it was built from."""

from __future__ import annotations

from pathlib import Path

import click

from furiosa_llm.cli.command import command
from furiosa_llm.cli.options import PROGRESS, working
from furiosa_llm.cli.terminal import line
from furiosa_llm.runtime.artifact.progress import tell
from furiosa_llm.runtime.artifact.units import nbytes


@command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.argument("output", metavar="OUT.onnx", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Replace OUT.onnx and OUT.onnx.data if they exist.")
@PROGRESS
def unbuild(artifact: Path, output: Path, force: bool, progress: bool | None) -> None:
    """Write the ONNX model that ARTIFACT was built from to OUT.onnx, and its weights to OUT.onnx.data.

    Every weight is put together from its shards and compared with the digest of the original: what is written is the
    original's, bit for bit, or nothing is.
    """
    with working(progress):
        from furiosa_llm.runtime.artifact.reader import open_artifact
        from furiosa_llm.runtime.artifact.tools import unbuild as library

        tell("opening the artifact")
        written = library.unbuild(open_artifact(artifact, full=False), output, force=force)
    where = f" and {written.data}" if written.data is not None else ""
    line(
        f"{written.model}{where}: {written.num_initializers} initializers, {written.num_rebuilt} of them put together "
        f"from shards ({nbytes(written.nbytes)}), all as they were"
    )
