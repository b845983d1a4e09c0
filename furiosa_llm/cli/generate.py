"""`furiosa-llm generate`: complete one prompt, streaming."""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path
from typing import Any

import click

from furiosa_llm.cli.command import ENGINE_GROUPS, command
from furiosa_llm.cli.options import CLUSTER, ENGINE, PLACEMENT, PROGRESS, options, working
from furiosa_llm.cli.terminal import line
from furiosa_llm.runtime.artifact.progress import tell


@command(groups=ENGINE_GROUPS)
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--prompt", required=True, help="The text to complete, or with --chat the user's message.")
@click.option("--chat", is_flag=True, help="Put the prompt into the model's chat template.")
@click.option("--max-tokens", type=int, default=128, show_default=True, help="The most tokens to generate.")
@click.option(
    "--temperature", type=float, default=0.0, show_default=True, help="0 takes the likeliest token each time."
)
@click.option(
    "--top-p", type=float, default=1.0, show_default=True, help="Sample from the likeliest tokens of this mass."
)
@click.option("--top-k", type=int, default=-1, show_default=True, help="Sample from the k likeliest tokens; -1: all.")
@click.option("--seed", type=int, help="Makes sampling reproducible.")
@click.option("--lora", help="The adapter to generate with: NAME=PATH, or the NAME of one of the artifact's own.")
@options(
    ENGINE, *PLACEMENT, "tokenizer", "workers", "threads", "full_verification", "batch_invariant", "mapped", "separate"
)
@options(ENGINE, *CLUSTER, "step_timeout", "max_step_nbytes", "compute", "spin_us")
@PROGRESS
def generate(
    artifact: Path,
    prompt: str,
    chat: bool,
    max_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    seed: int | None,
    lora: str | None,
    progress: bool | None,
    **loading: Any,
) -> None:
    """Complete a prompt with the decoder in ARTIFACT.

    The text goes to standard output as it is generated, the figures to standard error.
    """
    with contextlib.ExitStack() as waiting:
        waiting.enter_context(working(progress))
        from furiosa_llm.runtime import LLM, LoRARequest, SamplingParams

        params = SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, max_tokens=max_tokens, seed=seed)
        name, _, path = (lora or "").partition("=")
        adapter = None if lora is None else LoRARequest(name, 1, path)
        started = time.monotonic()
        with LLM.load_artifact(artifact, **loading) as llm:
            loaded = time.monotonic()
            text = llm.tokenizer.apply_chat_template([{"role": "user", "content": prompt}]) if chat else prompt
            tell("reading the prompt")
            first, count, shown = 0.0, 0, 0
            for output in llm.stream_outputs(text, params, lora_request=adapter):
                waiting.close()
                count += 1
                first = first or time.monotonic()
                completed = output.outputs[0].text
                sys.stdout.write(completed[shown:])
                sys.stdout.flush()
                shown = len(completed)
            ended = time.monotonic()
    sys.stdout.write("\n")
    rate = f", {(count - 1) / (ended - first):.1f} tokens/s after the first" if count > 1 else ""
    line(
        f"loaded in {loaded - started:.2f} s, first token {first - loaded:.2f} s later, {count} tokens{rate}", err=True
    )
