"""`furiosa-llm sign`: the signature of an artifact."""

from __future__ import annotations

from pathlib import Path

import click

from furiosa_llm.cli.command import command
from furiosa_llm.cli.options import working
from furiosa_llm.cli.terminal import line


@command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--key", type=click.Path(path_type=Path), required=True, help="PEM file of a private Ed25519 key.")
def sign(artifact: Path, key: Path) -> None:
    """Sign ARTIFACT, once all of its files were compared with their digests; verify --key checks the signature.

    docs/artifact-tools.md says how keys are made. Needs the extra `sign`: pip install 'furiosa-llm-onnx[sign]'.
    """
    with working():
        from furiosa_llm.signing import check_installed, sign_artifact

        check_installed()
        signature = sign_artifact(artifact, key)
    line(f"signed: {signature}")
