"""`verify_artifact`: every check of an artifact that `furiosa-llm verify` runs, and the record of what they found."""

from __future__ import annotations

import importlib.metadata
import math
import os
import secrets
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from furiosa_llm.builder.proof import check_program, constants_of
from furiosa_llm.builder.source.folder import find_model
from furiosa_llm.builder.write.artifact import tool
from furiosa_llm.parity_options import HALF_TOLERANCE, MAX_SEED, TOLERANCE, ParityOptions
from furiosa_llm.runtime.artifact.errors import ArtifactError, FuriosaLLMError
from furiosa_llm.runtime.artifact.manifest import MANIFEST_NAME, Manifest, manifest_digest
from furiosa_llm.runtime.artifact.parse import parse_manifest
from furiosa_llm.runtime.artifact.progress import shown, tell
from furiosa_llm.runtime.artifact.reader import FULL_BELOW_NBYTES, Artifact, open_artifact
from furiosa_llm.runtime.artifact.temporary import temporary_folder
from furiosa_llm.runtime.artifact.tools.integrity import Limit, check_originals, check_padding, check_weights
from furiosa_llm.runtime.artifact.tools.record import Check, Compared, Verification
from furiosa_llm.runtime.artifact.tools.unbuild import unbuild
from furiosa_llm.runtime.errors import StepTimeoutError
from furiosa_llm.runtime.verification.errors import OutputDifference, TokenComparison
from furiosa_llm.runtime.verification.parity import DEFAULT_PROMPTS, UNFIT, Found, Parity, Subject
from furiosa_llm.source_checks import check_given, check_lowering

_NOT_FINITE = "NaN or infinite on one side"
_LIBRARIES = ("numpy", "onnx", "onnxruntime")


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a verification found: `record` is what verification.json says, `parity` the errors of every single output.

    `parity` is None if the artifact was not run, or did not run to the end.
    """

    record: Verification
    parity: Parity | None


@shown()
def verify_artifact(
    path: str | os.PathLike[str],
    *,
    against: str | os.PathLike[str] | None = None,
    full: bool = False,
    options: ParityOptions | None = None,
) -> Report:
    """Checks the artifact in the folder `path`; what is wrong with it is reported, not raised.

    Always: its structure, the digests of all files, but of more than FULL_BELOW_NBYTES of weights only with `full` or
    `against`, the static proof, and program and manifest compared with what source.onnx lowers to. `full`: every
    original put together from its shards, and padding. `full` or `against`: outputs and greedy tokens compared with the
    unsplit model, which is `against`, or is put back together from the artifact in a temporary folder. Nothing is
    written; `write_verification` does that with the report's record.

    Raises ArtifactError if there is no manifest to report on, and InputError, ModelLoadError, ExecutionError and
    UnsupportedError for a model or options that cannot be compared with.
    """
    options = options or ParityOptions()
    limit = _time_limit(options.time_limit)
    tell("opening the artifact")
    folder = Path(path).absolute()  # which no word of a message is
    try:
        artifact = open_artifact(folder, full=False)
    except ArtifactError as error:
        digest = _manifest_digest(folder)
        if digest is None:
            raise
        fault = Check(name="structure", checked=1, faults=(_line(error, folder),))
        return Report(record=_record(digest, [fault]), parity=None)
    tell("proving the program")
    checks = [Check(name="structure", checked=1 + len(artifact.manifest.files)), _proof(artifact)]
    tell("lowering source.onnx again")
    checks.append(_guarded(lambda: check_lowering(artifact), "lowering", folder))
    if full or against is not None or _weights_nbytes(artifact) < FULL_BELOW_NBYTES:
        checks.append(_guarded(lambda: check_weights(artifact, limit), "weights", folder))
    if full:
        checks.append(_guarded(lambda: check_originals(artifact, limit), "originals", folder))
        checks.append(_guarded(lambda: check_padding(artifact, limit), "padding", folder))
    parity = None
    comparable = all(check.passed for check in checks if check.name not in ("proof", "lowering"))
    if against is not None:
        against = find_model(Path(against))
        checks.append(check_given(artifact, against))
        found, parity = _compared_with_given(artifact, against, options, limit)
        checks += found
    elif full and comparable:
        found, parity = _compared_with_itself(artifact, options, limit)
        checks += found
    compared = None if parity is None else _extent(parity, given=against is not None, compute=options.compute)
    return Report(record=_record(artifact.digest, checks, compared), parity=parity)


def _manifest_digest(folder: Path) -> str | None:
    """The digest of the manifest; None if it is not sound even by itself, so that there is nothing to vouch against."""
    try:
        data = (folder / MANIFEST_NAME).read_bytes()
        parse_manifest(data)
    except (OSError, ArtifactError):
        return None
    return manifest_digest(data)


def _extent(parity: Parity, *, given: bool, compute: str | None) -> Compared:
    return Compared(
        model="given" if given else "rebuilt",
        lengths=tuple(sorted({case.length for case in parity.cases})),
        limit=parity.lengths.limit,
        seed=parity.seed,
        compute=compute,
    )


def _record(digest: str, checks: Sequence[Check], compared: Compared | None = None) -> Verification:
    return Verification(
        manifest_digest=digest,
        tool=tool(),
        libraries={name: importlib.metadata.version(name) for name in _LIBRARIES},
        checks=tuple(checks),
        compared=compared,
    )


def _proof(artifact: Artifact) -> Check:
    proof = check_program(artifact.program, artifact.manifest, constants_of(artifact))
    return Check(name="proof", checked=proof.num_nodes, faults=tuple(map(str, proof.faults)))


def _weights_nbytes(artifact: Artifact) -> int:
    return sum(entry.nbytes for entry in artifact.manifest.files if entry.path.endswith(".safetensors"))


def _guarded(check: Callable[[], Check], name: str, folder: Path) -> Check:
    """The check, or one whose fault is that the artifact does not even let it run."""
    try:
        found = check()
        return replace(found, faults=tuple(_line(fault, folder) for fault in found.faults))
    except UNFIT as error:
        fault = _line(error, folder)
        return Check(name=name, checked=1, faults=(fault,), late=_is_late(error, [fault]))


def _line(error: FuriosaLLMError | str, *folders: Path) -> str:
    """An error as a fault: one line that names no folder of this machine."""
    line = " ".join(str(error).split())
    for folder in folders:
        for prefix in (folder.resolve(), folder):
            line = line.replace(f"{prefix}{os.sep}", "").replace(str(prefix), "the artifact")
    return line


# -- the artifact compared with its model --------------------------------------------------------------------------


def _compared_with_itself(
    artifact: Artifact, options: ParityOptions, limit: Limit
) -> tuple[list[Check], Parity | None]:
    """The artifact compared with the unsplit model that is put back together from it."""
    with temporary_folder(Path(tempfile.gettempdir()), "furiosa-llm-verify-") as temporary:
        model = temporary / "model.onnx"
        tell("putting the model together")
        try:
            unbuild(artifact, model)
            return _compared(artifact, model, options, limit)
        except UNFIT as error:
            line = f"the model put back together from the artifact: {_line(error, artifact.folder, model.parent)}"
            return [Check(name="stitched", checked=1, faults=(line,), late=_is_late(error, [line]))], None


def _compared_with_given(
    artifact: Artifact, model: Path, options: ParityOptions, limit: Limit
) -> tuple[list[Check], Parity | None]:
    """The artifact compared with the model that the user gave, which may take too long."""
    try:
        return _compared(artifact, model, options, limit)
    except StepTimeoutError as error:
        line = _line(error, artifact.folder, model.parent)
        return [Check(name="stitched", checked=1, faults=(line,), late=True)], None


def _compared(
    artifact: Artifact, model: str | os.PathLike[str], options: ParityOptions, limit: Limit
) -> tuple[list[Check], Parity]:
    tolerance = _tolerance(artifact.manifest, options.compute) if options.tolerance is None else options.tolerance
    subject = Subject(
        artifact,
        model,
        sizes=options.sizes,
        threads=options.threads,
        compute=options.compute,
        seed=secrets.randbelow(MAX_SEED) if options.seed is None else options.seed,
        max_length=options.max_length,
        step_timeout=options.step_timeout,
        check=limit,
    )
    findings = subject.compare(DEFAULT_PROMPTS if options.prompts is None else options.prompts, options.max_tokens)
    checks = [
        _output_check(name, found, tolerance, artifact.folder)
        for name, found in (("stitched", findings.stitched), ("executor", findings.executor))
    ]
    if findings.tokens.errors or findings.tokens.failure is not None:
        checks.append(_token_check(findings.tokens, tolerance, artifact.folder))
    if findings.engine.errors or findings.engine.failure is not None:
        checks.append(_output_check("engine", findings.engine, tolerance, artifact.folder))
    return checks, subject.parity(findings)


def _time_limit(seconds: float | None) -> Limit:
    """A function that raises StepTimeoutError once so many seconds have passed."""
    started = time.monotonic()

    def check() -> None:
        if seconds is not None and time.monotonic() - started > seconds:
            raise StepTimeoutError(
                f"the verification took longer than its limit of {seconds:g} s; give a longer --time-limit "
                "(time_limit=), or a smaller --max-length (max_length=)"
            )

    return check


def _tolerance(manifest: Manifest, compute: str | None) -> float:
    halves = compute is None and any(tensor.dtype == "FLOAT16" for tensor in manifest.tensors)
    rounded = any(info.role == "state" and info.dtype.startswith(("INT", "UINT")) for info in manifest.inputs)
    return HALF_TOLERANCE if halves or rounded else TOLERANCE


def _output_check(name: str, found: Found[OutputDifference], tolerance: float, folder: Path) -> Check:
    errors = found.errors
    faults = [
        f"{error.case}: {error.output!r:.80} is "
        + (f"{error.mean:.1e} off in the mean, {error.relative:.1e} at most" if error.finite else _NOT_FINITE)
        for error in errors
        if not error.within(tolerance)
    ]
    if found.failure is not None:
        faults.append(_line(found.failure, folder))
    greatest = max((error.mean for error in errors), default=math.inf)
    finite = all(error.finite for error in errors) and math.isfinite(greatest)
    return Check(
        name=name,
        checked=len(errors),
        faults=tuple(faults),
        greatest_error=greatest if finite else None,
        tolerance=tolerance,
        late=_is_late(found.failure, faults),
    )


def _token_check(found: Found[TokenComparison], tolerance: float, folder: Path) -> Check:
    faults = [
        f"prompt {number}: {_token_fault(one)}; {tolerance * one.magnitude:.1e} is allowed"
        for number, one in enumerate(found.errors)
        if not one.within(tolerance)
    ]
    if found.failure is not None:
        faults.append(_line(found.failure, folder))
    return Check(name="tokens", checked=len(found.errors), faults=tuple(faults), late=_is_late(found.failure, faults))


def _is_late(failure: FuriosaLLMError | None, faults: Sequence[str]) -> bool:
    """Whether a check failed because it was not done in time, and found nothing wrong before."""
    return isinstance(failure, StepTimeoutError) and len(faults) == 1


def _token_fault(one: TokenComparison) -> str:
    off = f"the artifact's logits are {one.logit_error:.1e} off"
    if one.first_difference is None:
        return off
    return f"token {one.first_difference} differs, where the best two logits are {one.gap:.1e} apart and {off}"
