"""`furiosa-llm verify`: an artifact against itself and against the model it was built from, with a record of it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.table import Table

from furiosa_llm.cli.options import ENGINE, Sizes, option
from furiosa_llm.cli.terminal import Console, line
from furiosa_llm.parity_options import HALF_TOLERANCE, MAX_SEED, TOLERANCE, ParityOptions
from furiosa_llm.runtime.artifact.units import counted

if TYPE_CHECKING:
    from furiosa_llm.runtime.artifact.tools.record import Check
    from furiosa_llm.runtime.verification.errors import OutputDifference, TokenComparison
    from furiosa_llm.runtime.verification.parity import Parity
    from furiosa_llm.verification import Report

_COUNTED = {
    "structure": "file",
    "proof": "node",
    "lowering": "node",
    "weights": "file or tensor",
    "originals": "original",
    "padding": "tensor",
    "identity": "weight",
    "stitched": "output",
    "executor": "output",
    "tokens": "prompt",
    "engine": "step kind",
}


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--full", is_flag=True, help="Read all weights: digests, originals, padding; and run the artifact.")
@click.option(
    "--against", type=click.Path(path_type=Path), help="The .onnx file (or folder) it was built from, to compare with."
)
@click.option("--key", type=click.Path(path_type=Path), help="Public key by which ARTIFACT must be signed, in PEM.")
@click.option("--no-record", is_flag=True, help="Write no verification.json into ARTIFACT.")
@click.option("--prompt", "prompts", multiple=True, help="A prompt to compare greedy tokens on; may be repeated.")
@click.option("--max-tokens", type=click.IntRange(min=1), default=32, show_default=True, help="Tokens per prompt.")
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0.0),
    help="Greatest mean error to accept in an output, relative to its largest element.  "
    f"[default: {TOLERANCE:g}, float16 {HALF_TOLERANCE:g}]",
)
@click.option("--dim", "dims", type=Sizes(), multiple=True, help="Size of a dynamic input dimension to run with.")
@click.option(
    "--seed",
    type=click.IntRange(min=0, max=MAX_SEED),
    help="Seed of lengths and inputs, to repeat a comparison.  [default: one from the system]",
)
@click.option(
    "--max-length", type=click.IntRange(min=1), help="Longest sequence to compare at.  [default: what is affordable]"
)
@click.option(
    "--time-limit", type=click.FloatRange(min=0.0), help="Seconds after which no step of the comparison is begun."
)
@option("threads", ENGINE, help="Threads that run the models.  [default: the cores]")
@option("compute", ENGINE)
def verify(
    artifact: Path,
    full: bool,
    against: Path | None,
    key: Path | None,
    no_record: bool,
    prompts: tuple[str, ...],
    max_tokens: int,
    tolerance: float | None,
    dims: tuple[tuple[str, int], ...],
    seed: int | None,
    max_length: int | None,
    time_limit: float | None,
    threads: int | None,
    compute: str | None,
) -> None:
    """Check ARTIFACT: its structure, that its ranks compute one unsplit model, and that this is its source.onnx.

    --full also checks that all weights are the original's, and compares the artifact with the model that it is put back
    together to. --against compares it with the model it was built from. Without either no output is compared. What was
    found is written into ARTIFACT, as verification.json. Exit code 0 if all that was checked is right, 1 otherwise.
    """
    from furiosa_llm.runtime.artifact.composite import is_composite
    from furiosa_llm.verification import verify_artifact

    options = ParityOptions(
        tolerance=tolerance,
        prompts=prompts or None,
        max_tokens=max_tokens,
        sizes=dict(dims),
        threads=threads,
        compute=compute,
        seed=seed,
        max_length=max_length,
        time_limit=time_limit,
    )
    if key is not None:
        from furiosa_llm.signing import check_installed, check_signature

        check_installed()
        check_signature(artifact, key)
        line(f"signed by the key {key}, and every file has its digest")
    console = Console()
    if is_composite(artifact):
        sys.exit(_verify_parts(console, artifact, against, full=full, record=not no_record, options=options))
    report = verify_artifact(artifact, against=against, full=full, options=options)
    _show(console, artifact, report, record=not no_record)
    sys.exit(0 if report.record.passed else 1)


def _verify_parts(
    console: Console, artifact: Path, against: Path | None, *, full: bool, record: bool, options: ParityOptions
) -> int:
    """Verifies a composite artifact; the exit code."""
    from furiosa_llm.composite_verification import verify_composite

    found = verify_composite(artifact, against=against, full=full, options=options)
    for name, report in found.parts.items():
        line(f"{name}:")
        _show(console, artifact / name, report, record=record)
    if found.fault is not None:
        line(f"the parts do not make one whole: {found.fault}")
    whole = "verified" if found.passed else "NOT verified"
    line(f"{whole}: {', '.join(found.parts)}, and how they fit")
    return 0 if found.passed else 1


def _show(console: Console, artifact: Path, report: Report, *, record: bool) -> None:
    """Prints what was found of one artifact, and records it there."""
    if report.parity is not None:
        _show_parity(console, report.parity)
    for check in report.record.checks:
        _show_check(check)
    passed = report.record.passed
    within = next((f" within {check.tolerance:g}" for check in report.record.checks if check.tolerance is not None), "")
    verdict = f"verified{within}: " if passed else f"NOT verified{within}; this was checked: "
    line(f"{verdict}{report.record.words}")
    if report.parity is not None and not passed:
        line(f"repeat it with --seed {report.parity.seed}")
    if record:
        from furiosa_llm.runtime.artifact.tools.record import write_verification

        path = write_verification(artifact, report.record)
        line(f"recorded in {path}")


def _show_check(check: Check) -> None:
    from furiosa_llm.runtime.artifact.tools.record import CHECKS

    noun = _COUNTED[check.name]
    count = counted(check.checked, noun) if check.name != "weights" else f"{check.checked} files and tensors"
    error = "" if check.greatest_error is None else f", greatest error {check.greatest_error:.1e}"
    within = "" if check.tolerance is None else f", tolerance {check.tolerance:g}"
    verdict = CHECKS[check.name] if check.passed else "FAILED"
    line(f"{check.name}: {verdict} ({count}{error}{within})")
    for fault in check.faults:
        line(f"  {fault}")


def _show_parity(console: Console, parity: Parity) -> None:
    if parity.stitched or parity.outputs or parity.engine:
        console.print(_outputs_table(parity), crop=False)
    for comparison in parity.tokens:
        line(_tokens_line(comparison))
    if parity.accuracy_level_replaced:
        line("MatMulNBits was compared at accuracy level 0, without rounding activations to 8 bits.")


def _outputs_table(parity: Parity) -> Table:
    table = Table(title="greatest mean error of an output, relative to its largest element", title_justify="left")
    ways = {"ranks in one graph": parity.stitched, "executor": parity.outputs, "engine": parity.engine}
    for column in ("step", *ways):
        table.add_column(column, no_wrap=True)
    for case in dict.fromkeys(error.case for errors in ways.values() for error in errors):
        table.add_row(case, *(_worst([error for error in errors if error.case == case]) for errors in ways.values()))
    return table


def _worst(errors: Sequence[OutputDifference]) -> str:
    if not errors:
        return ""
    worst = max(errors, key=lambda error: (not error.finite, error.mean))
    return f"{worst.mean:.1e} {worst.output:.40}" + ("" if worst.finite else "  NaN or infinity on one side")


def _tokens_line(comparison: TokenComparison) -> str:
    text = f"{comparison.prompt!r}: {comparison.tokens} greedy tokens, logit error {comparison.logit_error:.1e}: "
    if comparison.first_difference is None:
        return text + "equal"
    return text + f"token {comparison.first_difference} differs, where the best two are {comparison.gap:.1e} apart"
