"""What verification.json says of the artifact that it lies in, in words: what was compared with what."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from furiosa_llm.runtime.artifact.manifest import RECORD_NAME
from furiosa_llm.runtime.artifact.tools.record import RecordError, Verification, read_verification

VerificationStatus = Literal["none", "passed", "failed", "another manifest", "unreadable"]

_SHOWN_FAULTS = 3
_SHOWN_DIGITS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class VerificationSummary:
    """What verification.json says of this artifact; `str` gives it in words.

    `another manifest`: it vouches for the manifest of the digest `detail`, not for this one; `unreadable`: it is no
    record, `detail` says why. `checks` are the checks that ran and whether each passed; `faults` what was wrong;
    `words` say what was compared with what.
    """

    status: VerificationStatus
    detail: str = ""
    checks: Mapping[str, bool] = dataclasses.field(default_factory=dict)
    faults: tuple[str, ...] = ()
    words: str = ""

    def __str__(self) -> str:
        match self.status:
            case "none":
                return "none; run `furiosa-llm verify`"
            case "unreadable":
                return f"unreadable: {self.detail}"
            case "another manifest":
                shown = self.detail[:_SHOWN_DIGITS]
                return f"{RECORD_NAME} vouches for another manifest, {shown}..., not for this one"
            case "passed":
                return f"{RECORD_NAME}, which nobody signs, says passed: {self.words}"
            case "failed":
                failed = ", ".join(name for name, passed in self.checks.items() if not passed)
                return "; ".join([f"FAILED: {failed}", *self.faults[:_SHOWN_FAULTS]])


def verification_of(folder: Path, digest: str) -> VerificationSummary:
    """What verification.json in `folder` says of the manifest with `digest`; nothing is raised."""
    try:
        record = read_verification(folder)
    except RecordError as error:
        return VerificationSummary(status="unreadable", detail=str(error))
    if record is None:
        return VerificationSummary(status="none")
    return _summary(record, digest)


def _summary(record: Verification, digest: str) -> VerificationSummary:
    if record.manifest_digest != digest:
        return VerificationSummary(status="another manifest", detail=record.manifest_digest)
    return VerificationSummary(
        status="passed" if record.passed else "failed",
        checks={check.name: check.passed for check in record.checks},
        faults=tuple(fault for check in record.checks for fault in check.faults),
        words=record.words,
    )
