"""`verify_artifact`: every check of an artifact that `furiosa-llm verify` runs, and the record of what they found."""

from __future__ import annotations

import importlib.metadata
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from furiosa_llm.builder.proof import check_program, constants_of
from furiosa_llm.builder.source.identity import check_identity
from furiosa_llm.runtime.artifact.errors import ArtifactError, FuriosaLLMError
from furiosa_llm.runtime.artifact.manifest import MANIFEST_NAME, Manifest, manifest_digest
from furiosa_llm.runtime.artifact.parse import parse_manifest
from furiosa_llm.runtime.artifact.reader import FULL_BELOW_NBYTES, Artifact, open_artifact
from furiosa_llm.runtime.artifact.tools.integrity import check_originals, check_padding, check_weights
from furiosa_llm.runtime.artifact.tools.record import Check, Verification
from furiosa_llm.runtime.artifact.tools.unbuild import unbuild
from furiosa_llm.runtime.errors import ExecutionError, InputError
from furiosa_llm.runtime.verification.parity import DEFAULT_PROMPTS, OutputError, Parity, Subject, TokenComparison

TOLERANCE = 1e-4
HALF_TOLERANCE = 5e-3
"""Of a model with float16 weights: 11 bits, and a partial sum is rounded on every rank."""

_DISTRIBUTION = "furiosa-llm-onnx"
_LIBRARIES = ("numpy", "onnx", "onnxruntime")
_UNFIT = (ArtifactError, ExecutionError, InputError)
"""What an artifact whose files are all there may still raise when it is run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a verification found: `record` is what verification.json says, `parity` the errors of every single output.

    `parity` is None if the artifact was not run, or did not run to the end.
    """

    record: Verification
    parity: Parity | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityOptions:
    """How artifact and model are compared; see `furiosa_llm.runtime.verify_against`.

    `tolerance` is relative to an output's greatest magnitude; None: TOLERANCE, or HALF_TOLERANCE for float16 weights.
    """

    tolerance: float | None = None
    prompts: Sequence[str] = DEFAULT_PROMPTS
    max_tokens: int = 32
    sizes: Mapping[str, int] | None = None
    threads: int | None = None
    seed: int = 0


def verify_artifact(
    path: str | os.PathLike[str],
    *,
    against: str | os.PathLike[str] | None = None,
    full: bool = False,
    options: ParityOptions | None = None,
) -> Report:
    """Checks the artifact in the folder `path`; what is wrong with it is reported, not raised.

    Always: its structure, the digests of all files, but of more than FULL_BELOW_NBYTES of weights only with `full` or
    `against`, and the static proof. `full`: every original put together from its shards, and padding. `full` or
    `against`: outputs and greedy tokens compared with the unsplit model, which is `against`, or is put back together
    from the artifact in a temporary folder. Nothing is written; `write_verification` does that with the report's
    record.

    Raises ArtifactError if there is no manifest to report on, and InputError, ModelLoadError, ExecutionError and
    UnsupportedError for a model or options that cannot be compared with.
    """
    folder = Path(path).absolute()  # which no word of a message is
    try:
        artifact = open_artifact(folder, full=False)
    except ArtifactError as error:
        digest = _manifest_digest(folder)
        if digest is None:
            raise
        fault = Check(name="structure", checked=1, faults=(_line(error, folder),))
        return Report(record=_record(digest, [fault]), parity=None)
    checks = [Check(name="structure", checked=1 + len(artifact.manifest.files)), _proof(artifact)]
    if full or against is not None or _weights_nbytes(artifact) < FULL_BELOW_NBYTES:
        checks.append(_guarded(lambda: check_weights(artifact), "weights", folder))
    if full:
        checks.append(_guarded(lambda: check_originals(artifact), "originals", folder))
        checks.append(_guarded(lambda: check_padding(artifact), "padding", folder))
    parity = None
    if against is not None:
        checks.append(check_identity(artifact, against))
        found, parity = _compared(artifact, against, options or ParityOptions())
        checks += found
    elif full and all(check.passed for check in checks if check.name != "proof"):
        found, parity = _compared_with_itself(artifact, options or ParityOptions())
        checks += found
    return Report(record=_record(artifact.digest, checks), parity=parity)


def _manifest_digest(folder: Path) -> str | None:
    """The digest of the manifest; None if it is not sound even by itself, so that there is nothing to vouch against."""
    try:
        data = (folder / MANIFEST_NAME).read_bytes()
        parse_manifest(data)
    except (OSError, ArtifactError):
        return None
    return manifest_digest(data)


def _record(digest: str, checks: Sequence[Check]) -> Verification:
    return Verification(
        manifest_digest=digest,
        tool=f"{_DISTRIBUTION} {importlib.metadata.version(_DISTRIBUTION)}",
        libraries={name: importlib.metadata.version(name) for name in _LIBRARIES},
        checks=tuple(checks),
    )


def _proof(artifact: Artifact) -> Check:
    proof = check_program(artifact.program, artifact.manifest, constants_of(artifact))
    return Check(name="proof", checked=proof.num_nodes, faults=tuple(map(str, proof.faults)))


def _weights_nbytes(artifact: Artifact) -> int:
    return sum(entry.nbytes for entry in artifact.manifest.files if entry.path.endswith(".safetensors"))


def _guarded(check: Callable[[], Check], name: str, folder: Path) -> Check:
    """The check, or one whose fault is that the artifact does not even let it run."""
    try:
        return check()
    except _UNFIT as error:
        return Check(name=name, checked=1, faults=(_line(error, folder),))


def _line(error: FuriosaLLMError, *folders: Path) -> str:
    """An error as a fault: one line that names no folder of this machine."""
    line = " ".join(str(error).split())
    for folder in folders:
        for prefix in (folder.resolve(), folder):
            line = line.replace(f"{prefix}{os.sep}", "").replace(str(prefix), "the artifact")
    return line


# -- the artifact compared with its model --------------------------------------------------------------------------


def _compared_with_itself(artifact: Artifact, options: ParityOptions) -> tuple[list[Check], Parity | None]:
    """The artifact compared with the unsplit model that is put back together from it."""
    with tempfile.TemporaryDirectory(prefix="furiosa-llm-verify-") as temporary:
        model = Path(temporary) / "model.onnx"
        try:
            unbuild(artifact, model)
            return _compared(artifact, model, options)
        except _UNFIT as error:
            line = f"the model put back together from the artifact: {_line(error, artifact.folder, model.parent)}"
            return [Check(name="stitched", checked=1, faults=(line,))], None


def _compared(
    artifact: Artifact, model: str | os.PathLike[str], options: ParityOptions
) -> tuple[list[Check], Parity | None]:
    tolerance = _tolerance(artifact.manifest) if options.tolerance is None else options.tolerance
    subject = Subject(artifact, model, sizes=options.sizes, threads=options.threads, seed=options.seed)
    found: dict[str, Check] = {}
    stitched: tuple[OutputError, ...] = ()
    outputs: tuple[OutputError, ...] = ()
    tokens: tuple[TokenComparison, ...] = ()

    def stitch() -> Check:
        nonlocal stitched
        stitched = subject.stitched()
        return _output_check("stitched", stitched, tolerance)

    def execute() -> Check:
        nonlocal outputs, tokens
        outputs, tokens = subject.executed(options.prompts, options.max_tokens)
        return _output_check("executor", outputs, tolerance)

    for name, check in (("stitched", stitch), ("executor", execute)):
        found[name] = _guarded(check, name, artifact.folder)
    if tokens:
        found["tokens"] = _token_check(tokens)
    parity = Parity(
        stitched=stitched,
        outputs=outputs,
        tokens=tokens,
        accuracy_level_replaced=subject.accuracy_level_replaced,
    )
    return list(found.values()), parity


def _tolerance(manifest: Manifest) -> float:
    return HALF_TOLERANCE if any(tensor.dtype == "FLOAT16" for tensor in manifest.tensors) else TOLERANCE


def _output_check(name: str, errors: Sequence[OutputError], tolerance: float) -> Check:
    faults = [
        f"{error.case}: {error.output!r:.80} is "
        + (f"{error.relative:.1e} off" if error.finite else "NaN or infinite on one side")
        for error in errors
        if not error.within(tolerance)
    ]
    greatest = max((error.relative for error in errors), default=math.inf)
    finite = all(error.finite for error in errors) and math.isfinite(greatest)
    return Check(
        name=name,
        checked=len(errors),
        faults=tuple(faults),
        greatest_error=greatest if finite else None,
        tolerance=tolerance,
    )


def _token_check(tokens: Iterable[TokenComparison]) -> Check:
    compared = list(tokens)
    faults = [
        f"prompt {number}: token {one.first_difference} differs, where the best two logits are {one.gap:.1e} apart and "
        f"those of the artifact {one.logit_error:.1e} off"
        for number, one in enumerate(compared)
        if not one.identical
    ]
    return Check(name="tokens", checked=len(compared), faults=tuple(faults))
