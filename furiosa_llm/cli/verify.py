"""`furiosa-llm verify`: an artifact against itself and against the model it was built from, with a record of it."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from furiosa_llm.cli.command import command
from furiosa_llm.cli.options import ENGINE, PROGRESS, Sizes, option, working
from furiosa_llm.cli.output import JSON, echo_json
from furiosa_llm.cli.terminal import Console, line
from furiosa_llm.parity_options import HALF_TOLERANCE, MAX_SEED, TOLERANCE, ParityOptions
from furiosa_llm.runtime.artifact.units import counted

if TYPE_CHECKING:
    from furiosa_llm.runtime.artifact.tools.record import Check
    from furiosa_llm.runtime.verification.errors import OutputDifference, TokenComparison
    from furiosa_llm.runtime.verification.parity import Parity
    from furiosa_llm.verification import Report

_UNDECIDED = 3
"""The exit code where nothing is wrong, but not all was checked."""
_LATE = "could not be checked in time"
_TRY_AGAIN = (
    "verify it again where less runs beside it, with a longer --time-limit or --step-timeout, or a smaller --max-length"
)
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


@command()
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
    f"[default: {TOLERANCE:g}, float16 weights or caches of integers {HALF_TOLERANCE:g}]",
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
    "--time-limit",
    type=click.FloatRange(min=0.0),
    help="Seconds after which nothing more is checked; of a composite artifact, for each part.",
)
@click.option(
    "--step-timeout",
    type=click.FloatRange(min=0.0, min_open=True),
    help="Seconds of the processor after which a step is ended.  [default: by the model's size, 8 s or more]",
)
@option("threads", ENGINE, help="Threads that run the models.  [default: the cores]")
@option("compute", ENGINE)
@click.option("--verbose", is_flag=True, help="Show the errors of each step, and the tokens of each prompt.")
@JSON
@PROGRESS
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
    step_timeout: float | None,
    threads: int | None,
    compute: str | None,
    verbose: bool,
    as_json: bool,
    progress: bool | None,
) -> None:
    """Check ARTIFACT: its structure, that its ranks compute one unsplit model, and that this is its source.onnx.

    --full also checks that all weights are the original's, and compares the artifact with the model that it is put back
    together to. --against compares it with the model it was built from. Without either no output is compared. What was
    found is written into ARTIFACT, as verification.json. Exit code 0 if all that was checked is right, 1 if
    something is wrong, 3 if nothing is, but not all could be checked in time: then nothing is recorded.
    """
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
        step_timeout=step_timeout,
    )
    with working(progress):
        if key is not None:
            from furiosa_llm.signing import check_installed, check_signature

            check_installed()
            check_signature(artifact, key)
        found = _verify(artifact, against, full=full, options=options)
    if not as_json:
        if key is not None:
            line(f"signed by the key {key}, and every file has its digest")
        _print(found, verbose=verbose)
    kept = {} if no_record else {name: one for name, one in found.parts.items() if not one.record.undecided}
    recorded = {name: _recorded(artifact / name, one) for name, one in kept.items()}
    if as_json:
        echo_json(_to_json(found, recorded))
    else:
        for path in filter(None, recorded.values()):
            line(f"recorded in {path}")
    sys.exit(0 if found.passed else _UNDECIDED if found.undecided else 1)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """What was found: a report for each part, under its name, or the one of an artifact without parts, under none."""

    parts: Mapping[str, Report]
    passed: bool
    fault: str | None = None

    @property
    def undecided(self) -> bool:
        """Whether nothing is wrong, but not all was checked in time."""
        records = [one.record for one in self.parts.values()]
        late = any(one.undecided for one in records)
        return late and self.fault is None and all(one.passed or one.undecided for one in records)


def _verify(artifact: Path, against: Path | None, *, full: bool, options: ParityOptions) -> _Found:
    from furiosa_llm.composite_verification import verify_composite
    from furiosa_llm.runtime.artifact.composite import is_composite
    from furiosa_llm.verification import verify_artifact

    if is_composite(artifact):
        found = verify_composite(artifact, against=against, full=full, options=options)
        return _Found(
            parts={str(name): one for name, one in found.parts.items()}, passed=found.passed, fault=found.fault
        )
    report = verify_artifact(artifact, against=against, full=full, options=options)
    return _Found(parts={"": report}, passed=report.record.passed)


def _recorded(folder: Path, report: Report) -> Path | None:
    """Where the record was written; None, with a note, if the artifact is read-only."""
    from furiosa_llm.runtime.artifact.tools.record import ReadOnlyError, write_verification

    try:
        return write_verification(folder, report.record)
    except ReadOnlyError as error:
        line(f"note: nothing was recorded: {error}", err=True)
        return None


# -- for people ----------------------------------------------------------------------------------------------------


def _print(found: _Found, *, verbose: bool) -> None:
    console = Console()
    for name, report in found.parts.items():
        if name:
            line(f"{name}:")
        _show(console, report, verbose=verbose)
    if found.fault is not None:
        line(f"the parts do not make one whole: {found.fault}")
    if "" not in found.parts:
        whole = "verified" if found.passed else _LATE if found.undecided else "NOT verified"
        line(f"{whole}: {', '.join(found.parts)}, and how they fit")


def _show(console: Console, report: Report, *, verbose: bool) -> None:
    """Prints what was found of one artifact."""
    if report.parity is not None and verbose:
        _show_parity(console, report.parity)
    for check in report.record.checks:
        _show_check(check)
    passed, undecided = report.record.passed, report.record.undecided
    within = next((f" within {check.tolerance:g}" for check in report.record.checks if check.tolerance is not None), "")
    if undecided:
        line(f"{_LATE}, and nothing is recorded; {_TRY_AGAIN}")
        return
    verdict = f"verified{within}: " if passed else f"NOT verified{within}; this was checked: "
    line(f"{verdict}{report.record.words}")
    if report.parity is not None and not passed:
        line(f"repeat it with --seed {report.parity.seed}")


def _show_check(check: Check) -> None:
    from furiosa_llm.runtime.artifact.tools.record import CHECKS

    noun = _COUNTED[check.name]
    count = counted(check.checked, noun) if check.name != "weights" else f"{check.checked} files and tensors"
    error = "" if check.greatest_error is None else f", greatest error {check.greatest_error:.1e}"
    within = "" if check.tolerance is None else f", tolerance {check.tolerance:g}"
    verdict = CHECKS[check.name] if check.passed else "not checked in time" if check.late else "FAILED"
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


# -- for programs --------------------------------------------------------------------------------------------------


def _to_json(found: _Found, recorded: Mapping[str, Path | None]) -> dict[str, Any]:
    reports = {name: _report_json(report, recorded.get(name)) for name, report in found.parts.items()}
    whole = {"passed": found.passed, "undecided": found.undecided, "fault": found.fault, "parts": reports}
    return reports.get("") or whole


def _report_json(report: Report, recorded: Path | None) -> dict[str, Any]:
    return {
        "passed": report.record.passed,
        "undecided": report.record.undecided,
        "words": report.record.words,
        "record": report.record.to_json(),
        "comparison": None if report.parity is None else _parity_json(report.parity),
        "recorded": None if recorded is None else str(recorded),
    }


def _parity_json(parity: Parity) -> dict[str, Any]:
    ways = {"stitched": parity.stitched, "executor": parity.outputs, "engine": parity.engine}
    return {
        **{way: [_plain(error) for error in errors] for way, errors in ways.items()},
        "tokens": [_plain(comparison) for comparison in parity.tokens],
        "accuracy_level_replaced": parity.accuracy_level_replaced,
    }


def _plain(found: OutputDifference | TokenComparison) -> dict[str, Any]:
    """The fields; JSON knows no infinity and no NaN."""
    fields = dataclasses.asdict(found)
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in fields.items()
    }
