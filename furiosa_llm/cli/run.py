"""`furiosa-llm run`: any artifact on tensors."""

from __future__ import annotations

import zipfile
from pathlib import Path

import click
import numpy as np

from furiosa_llm.cli.options import ENGINE, options
from furiosa_llm.cli.terminal import line
from furiosa_llm.runtime import Executor, InputError, open_artifact


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--inputs", required=True, type=click.Path(path_type=Path), help="An .npz file with every input by name.")
@click.option(
    "--outputs", required=True, type=click.Path(path_type=Path), help="The .npz file to write all outputs to."
)
@options(ENGINE, "threads", "full_verification")
def run(artifact: Path, inputs: Path, outputs: Path, threads: int | None, full_verification: bool | None) -> None:
    """Run the model in ARTIFACT once on whole tensors: an encoder, a vision model, one step of a decoder.

    Inputs and outputs are those of the unsplit model.
    """
    arrays = _read(inputs)
    with Executor(open_artifact(artifact, full=full_verification), threads=threads) as executor:
        results = executor.run(arrays)
    try:
        with outputs.open("wb") as file:
            np.savez(file, allow_pickle=False, **results)
    except OSError as error:
        raise InputError(f"cannot write {outputs}: {error.strerror}; give a path that can be written.") from error
    for name, array in results.items():
        line(f"{name}: {array.dtype} {list(array.shape)}")


def _read(path: Path) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist; give an .npz file with the model's inputs (numpy.savez).") from error
    except (OSError, ValueError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{path} is not an .npz file of plain arrays: {error}; write one with numpy.savez(path, name=array, ...)."
        ) from error
