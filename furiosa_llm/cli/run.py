"""`furiosa-llm run`: any artifact on tensors."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from furiosa_llm.cli.command import command
from furiosa_llm.cli.options import ENGINE, PROGRESS, options, working
from furiosa_llm.cli.terminal import line
from furiosa_llm.runtime.artifact.progress import tell
from furiosa_llm.runtime.errors import InputError

if TYPE_CHECKING:
    from furiosa_llm.runtime.artifact.dtypes import Array
    from furiosa_llm.runtime.artifact.reader import Artifact


@command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--inputs", required=True, type=click.Path(path_type=Path), help="An .npz file with every input by name.")
@click.option(
    "--outputs", required=True, type=click.Path(path_type=Path), help="The .npz file to write all outputs to."
)
@options(ENGINE, "threads", "full_verification", "step_timeout", "max_step_nbytes", "compute")
@PROGRESS
def run(
    artifact: Path,
    inputs: Path,
    outputs: Path,
    full_verification: bool | None,
    compute: str | None,
    progress: bool | None,
    **loading: Any,
) -> None:
    """Run the model in ARTIFACT once on whole tensors: an encoder, a vision model, one step of a decoder.

    Inputs and outputs are those of the unsplit model.
    """
    with working(progress):
        import numpy as np

        from furiosa_llm.runtime import Executor, open_artifact
        from furiosa_llm.runtime.artifact.compute import computing

        opened = computing(open_artifact(artifact, full=full_verification), compute)
        arrays = _typed(_read(inputs), opened)
        with Executor(opened, **loading) as executor:
            tell("running the model")
            results = executor.run(arrays)
    try:
        with outputs.open("wb") as file:
            np.savez(file, allow_pickle=False, **results)
    except OSError as error:
        raise InputError(f"cannot write {outputs}: {error.strerror}; give a path that can be written.") from error
    for name, array in results.items():
        line(f"{name}: {array.dtype} {list(array.shape)}")


def _typed(arrays: dict[str, Array], artifact: Artifact) -> dict[str, Array]:
    """The arrays with the types that an .npz file has no names for: of bfloat16 it has only the bytes."""
    import numpy as np

    from furiosa_llm.runtime.artifact.dtypes import DTYPES

    types = {info.name: info.dtype for info in artifact.manifest.inputs} | dict(artifact.declared)
    kinds = {name: np.dtype(DTYPES[dtype].numpy) for name, dtype in types.items()}
    return {
        name: array.view(kinds[name])
        if array.dtype.kind == "V" and name in kinds and array.itemsize == kinds[name].itemsize
        else array
        for name, array in arrays.items()
    }


def _read(path: Path) -> dict[str, Array]:
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist; give an .npz file with the model's inputs (numpy.savez).") from error
    except (OSError, ValueError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{path} is not an .npz file of plain arrays: {error}; write one with numpy.savez(path, name=array, ...)."
        ) from error
