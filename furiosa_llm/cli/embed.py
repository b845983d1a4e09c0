"""`furiosa-llm embed`: texts into vectors, with an encoder's artifact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import click

from furiosa_llm.cli.command import command
from furiosa_llm.cli.options import ENGINE, PROGRESS, options, working
from furiosa_llm.runtime.artifact.pooling import PoolingType


@command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--text", "texts", required=True, multiple=True, help="A text; may be repeated.")
@click.option(
    "--pooling", type=click.Choice(get_args(PoolingType)), help="How tokens make a vector.  [default: the model's]"
)
@click.option("--normalize/--no-normalize", default=None, help="Give vectors the length 1.  [default: the model's]")
@click.option("--truncate", is_flag=True, help="Cut texts to the model's limit instead of refusing longer ones.")
@options(ENGINE, "tokenizer", "threads", "full_verification", "compute")
@PROGRESS
def embed(
    artifact: Path,
    texts: tuple[str, ...],
    pooling: PoolingType | None,
    normalize: bool | None,
    truncate: bool,
    tokenizer: Path | None,
    threads: int | None,
    full_verification: bool | None,
    compute: str | None,
    progress: bool | None,
) -> None:
    """Turn texts into vectors with the encoder in ARTIFACT: a line for each, an array in JSON."""
    with working(progress):
        from furiosa_llm.runtime.encoder import Encoder

        with Encoder.load_artifact(
            artifact, tokenizer=tokenizer, threads=threads, full_verification=full_verification, compute=compute
        ) as encoder:
            outputs = encoder.embed(
                list(texts),
                pooling=pooling,
                normalize=normalize,
                truncate_prompt_tokens=-1 if truncate else None,
            )
    for one in outputs:
        click.echo(json.dumps(one.outputs.embedding))
