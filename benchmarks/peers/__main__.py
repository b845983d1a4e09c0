"""`python -m benchmarks.peers`: measure, print the tables, fail if a bar is missed or a peer is not there."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import click
from rich.console import Console
from tokenizers import Tokenizer

from benchmarks.artifacts import FOLDER
from benchmarks.bars import show
from benchmarks.parity import PROMPTS
from benchmarks.peers.contenders import CLASSES, LARGE, Contender, contenders, missing
from benchmarks.peers.install import failures
from benchmarks.peers.limits import bars
from benchmarks.peers.machine import cores, describe_machine
from benchmarks.peers.measuring import Comparison, Prompts, Results, merged
from benchmarks.peers.models import prepare
from benchmarks.peers.table import as_json, markdown
from benchmarks.peers.worker import Worker
from fixtures.perplexity import excerpt_tokens

ROOT = Path(__file__).parents[2]
_DECODE, _PREFILL, _AT_ONCE, _EACH = 128, 512, 16, 32
_COMPARED, _COMPARED_TOKENS = 4, 24
_LARGE_COMPARED, _LARGE_DECODED, _LARGE_AT_ONCE = 4, 16, 9
_LEAST_VOCABULARY = 32000


@click.command()
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(min=1), help="Rounds that count.")
@click.option("--only", "names", multiple=True, help="Names of rows begin with this; may be repeated.")
@click.option("--limit", default=300.0, show_default=True, help="Seconds within which an engine must answer.")
def main(rounds: int, names: tuple[str, ...], limit: float) -> None:
    """Measure this project and its peers on SmolLM2 and two large models, in processes of their own that take turns."""
    files = prepare(FOLDER / "peers")
    chosen = [one for one in contenders(files, threads=cores()) if one.name.startswith(names or ("",))]
    prompts = make_prompts(files.models["genai-fp32"] / "tokenizer.json")
    start = partial(start_worker, limit=limit)
    results: dict[str, Results] = {}
    for numbers in CLASSES:
        of_class = [one for one in chosen if one.numbers == numbers]
        if of_class:
            asked = of_large(prompts) if numbers in LARGE.values() else prompts
            results[numbers] = Comparison(start, asked, say=say).run(of_class, rounds)
    machine = describe_machine()
    report(markdown(machine, results, rounds), json.dumps(as_json(machine, results, rounds), indent=1))
    for requirement, reason in failures().items():
        print(f"{requirement} does not install: {reason}")
    kept = show(bars(results), Console(width=120))
    lacking = missing(merged(results))
    if lacking:
        print(f"FAILED: not measured: {'; '.join(lacking)}", file=sys.stderr)
    if lacking or not kept:
        sys.exit(1)


def make_prompts(tokenizer: Path) -> Prompts:
    """The shipped excerpt in pieces, and the first of the prompts that parity is measured on."""
    text: list[int] = excerpt_tokens(tokenizer, max(_PREFILL, _AT_ONCE * _EACH))[0].tolist()
    encoder = Tokenizer.from_file(str(tokenizer))
    return Prompts(
        decode=text[:_DECODE],
        prefill=text[:_PREFILL],
        at_once=[text[start : start + _EACH] for start in range(0, _AT_ONCE * _EACH, _EACH)],
        compared=[encoder.encode(prompt, add_special_tokens=False).ids for prompt in PROMPTS[:_COMPARED]],
        compared_count=_COMPARED_TOKENS,
    )


def of_large(prompts: Prompts) -> Prompts:
    """The same for a model of another vocabulary whose tokens take long: completions are shorter."""

    def within(tokens: Sequence[int]) -> list[int]:
        return [token % _LEAST_VOCABULARY for token in tokens]

    return Prompts(
        decode=within(prompts.decode),
        prefill=within(prompts.prefill),
        at_once=[within(prompt) for prompt in prompts.at_once],
        compared=[within(prompt) for prompt in prompts.compared],
        compared_count=_LARGE_COMPARED,
        decoded=_LARGE_DECODED,
        at_once_tokens=_LARGE_AT_ONCE,
    )


def start_worker(contender: Contender, *, limit: float) -> Worker:
    """The contender's process; its log lies beside the results, under its name."""
    return Worker(
        contender.command,
        folder=ROOT,
        log=FOLDER / "peers" / f"{contender.name}.log",
        limit=limit,
        environment=contender.environment,
    )


def report(table: str, figures: str) -> None:
    """Prints the table, and writes both beside the other results."""
    (FOLDER / "peers.md").write_text(table)
    (FOLDER / "peers.json").write_text(figures + "\n")
    print(table)


def say(text: str) -> None:
    """To people, while it runs."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
