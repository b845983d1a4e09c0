"""`furiosa-llm verify`: an artifact against the model it was built from."""

from __future__ import annotations

import sys
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from furiosa_llm.builder.proof import prove
from furiosa_llm.runtime import verify_against
from furiosa_llm.runtime.verify import DEFAULT_PROMPTS, Report, TokenComparison

_DEFAULT_TOLERANCE = 1e-4


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--against", required=True, type=click.Path(path_type=Path), help="The .onnx file it was built from.")
@click.option("--prompt", "prompts", multiple=True, help="A prompt to compare greedy tokens on; may be repeated.")
@click.option("--max-tokens", type=click.IntRange(min=1), default=32, show_default=True, help="Tokens per prompt.")
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0.0),
    default=_DEFAULT_TOLERANCE,
    show_default=True,
    help="Greatest relative error to accept in an output; 16-bit models need about 5e-3.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the random inputs.")
@click.option("--threads", type=int, help="Driver threads that step the PEs.  [default: the cores]")
def verify(
    artifact: Path,
    against: Path,
    prompts: tuple[str, ...],
    max_tokens: int,
    tolerance: float,
    seed: int,
    threads: int | None,
) -> None:
    """Prove ARTIFACT, run it and the unsplit model on the same inputs, and compare outputs and greedy tokens.

    The static proof derives from program and manifest alone how every value lies over the PEs. Exit code 0 if it is
    complete, every output is within the tolerance and all tokens are identical, 1 otherwise.
    """
    proof = prove(artifact)
    report = verify_against(
        artifact, against, prompts=prompts or DEFAULT_PROMPTS, max_tokens=max_tokens, seed=seed, threads=threads
    )
    console = Console()
    console.print(_outputs_table(report), crop=False)
    for comparison in report.tokens:
        console.print(_tokens_line(comparison), highlight=False, soft_wrap=True)
    if report.accuracy_level_replaced:
        console.print("MatMulNBits was compared at accuracy level 0, without rounding activations to 8 bits.")
    for fault in proof.faults:
        console.print(f"not proved: {fault}", highlight=False, soft_wrap=True)
    if proof.is_proved:
        console.print(f"static proof: complete, {proof.num_nodes} nodes", highlight=False)
    verified = report.within(tolerance)
    console.print(f"verified within {tolerance:g}" if verified else f"NOT within {tolerance:g}", highlight=False)
    sys.exit(0 if verified and proof.is_proved else 1)


def _outputs_table(report: Report) -> Table:
    table = Table(title="greatest error per output", title_justify="left")
    for column in ("output", "case", "absolute", "relative to the largest"):
        table.add_column(column)
    for error in report.outputs:
        note = "" if error.finite else "  NaN or infinity on one side"
        table.add_row(error.output, error.case, f"{error.absolute:.1e}", f"{error.relative:.1e}{note}")
    return table


def _tokens_line(comparison: TokenComparison) -> str:
    line = f"{comparison.prompt!r}: {comparison.tokens} greedy tokens, logit error {comparison.logit_error:.1e}: "
    if comparison.first_difference is None:
        return line + "equal"
    verdict = "a tie within the error" if comparison.identical else "DIFFERENT"
    return (
        line
        + f"differ at token {comparison.first_difference}, where the best two are {comparison.gap:.1e} apart: {verdict}"
    )
