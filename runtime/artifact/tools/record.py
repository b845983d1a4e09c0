"""verification.json: what `furiosa-llm verify` found of the artifact that it lies in, written and strictly read.

The record names the manifest that it vouches for by its digest, so that it says nothing of any other. It is for people
and for `inspect`: no loader asks it. It holds no time, host or path.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from furiosa_llm.runtime.artifact.errors import ArtifactError, FuriosaLLMError
from furiosa_llm.runtime.artifact.json_reader import Field, parse_json
from furiosa_llm.runtime.artifact.manifest import RECORD_NAME
from furiosa_llm.runtime.artifact.options import FLOAT32
from furiosa_llm.runtime.artifact.temporary import replace_file

RECORD_FORMAT = "furiosa-llm-onnx-verification"
RECORD_VERSION = 2
_OLDEST_VERSION = 1
"""Records of version 1 are read, too: they have no `compared`, and compared at a few short lengths only."""
MAX_RECORD_NBYTES = 2**20
"""A longer record is refused unread, and the writer stays far below it."""

CHECKS: Mapping[str, str] = {
    "structure": "the folder is an artifact: every field, and the digests of all files but the weights",
    "proof": "program and manifest alone show that the ranks compute one unsplit model",
    "lowering": "every node of the program, and the manifest, are what this release makes of source.onnx",
    "weights": "the digests of the weights files and of every stored tensor",
    "originals": "every original, put together from its shards, has the original's digest",
    "padding": "padding is zero",
    "identity": "the model given has the nodes, inputs, outputs and weights of the one that was built",
    "stitched": "all ranks in one onnxruntime graph give the unsplit model's outputs",
    "executor": "the executor gives the unsplit model's outputs",
    "tokens": "greedy decoding gives the unsplit model's logits and tokens",
    "engine": "prompts whole and in chunks, batches and a moved slot give the unsplit model's logits",
}
"""What may be checked, in order, and what a check without faults says."""

_MAX_FAULTS = 20
_MAX_FAULT_LENGTH = 500
_DIGEST = re.compile("[0-9a-f]{64}")
_VERIFY_AGAIN = "verify the artifact again with `furiosa-llm verify`, which writes it anew"

_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)


class RecordError(FuriosaLLMError):
    """verification.json cannot be written, or is not what the format says; the artifact may still be sound."""


class ReadOnlyError(RecordError):
    """The folder of the artifact cannot be written to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One check that ran: `name` is a key of CHECKS, `checked` how many things it looked at (files, nodes, outputs).

    `faults` says what is wrong, a line each; none: the check passed. `greatest_error` (of outputs, the greatest mean;
    see `OutputError`) and `tolerance` are relative to the greatest magnitude of an output; None where nothing is
    measured, or where the error is not finite. `late`: its one fault is that it was not done in the time that it may
    take, which says nothing of the artifact; a record does not keep that.
    """

    name: str
    checked: int
    faults: tuple[str, ...] = ()
    greatest_error: float | None = None
    tolerance: float | None = None
    late: bool = False

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return not self.faults


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """What an artifact was compared with, and how far.

    `model` is `given`, or `rebuilt` from the artifact itself. `lengths` are those of the sequences, ascending, `limit`
    the model's longest, None for none. Lengths and inputs follow from `seed`. `compute` is the type that both computed
    in, None for their own.
    """

    model: Literal["given", "rebuilt"]
    lengths: tuple[int, ...]
    limit: int | None
    seed: int
    compute: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values; `compute` is there only if it is not None."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "compute" or value}

    def __str__(self) -> str:
        model = "the model given" if self.model == "given" else "the unsplit model put back together from this artifact"
        limit = "" if self.limit is None else f" of {self.limit}"
        first, last = self.lengths[0], self.lengths[-1]
        lengths = f"the length {first}" if first == last else f"{len(self.lengths)} lengths from {first} to {last}"
        computed = "" if self.compute is None else f", both in {self.compute}"
        return f"{model}{computed}, at {lengths}{limit}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What one verification found of the artifact whose manifest has the digest `manifest_digest`.

    `tool` is `name version`, `libraries` maps a library that computed to its version; `checks` are the checks that ran,
    at least one, in the order of CHECKS. `compared` is None if the artifact was not run to the end.
    """

    manifest_digest: str
    tool: str
    libraries: Mapping[str, str]
    checks: tuple[Check, ...]
    compared: Compared | None = None

    @property
    def passed(self) -> bool:
        """Whether every check that ran passed."""
        return all(check.passed for check in self.checks)

    @property
    def undecided(self) -> bool:
        """Whether nothing was found wrong, but something not checked in time: neither passed nor failed."""
        return not self.passed and all(check.passed or check.late for check in self.checks)

    @property
    def words(self) -> str:
        """What was compared with what, for people; of a failed one, what was to be."""
        names = {check.name for check in self.checks}
        said = []
        if "proof" in names:
            said.append("static proof that the ranks compute one model")
        if "lowering" in names:
            said.append("program and manifest compared with source.onnx lowered again")
        said.append("weights compared with their digests" if "weights" in names else "weights were not read")
        if "originals" in names:
            said.append("original weights put together from the shards")
        if "identity" in names:
            said.append("graph and weights compared with the model given")
        if self.compared is not None:
            said.append(f"ranks, executor and engine compared with {self.compared} (seed {self.compared.seed})")
        elif names & {"stitched", "executor"}:
            said.append("outputs compared with the unsplit model's, at lengths not recorded")
        else:
            said.append("no output was compared")
        return "; ".join(said)

    def to_json(self) -> dict[str, Any]:
        """The record as plain JSON values, keys in the order of the specification."""
        return {
            "format": {"name": RECORD_FORMAT, "version": RECORD_VERSION},
            "manifest_digest": self.manifest_digest,
            "tool": self.tool,
            "libraries": dict(self.libraries),
            "passed": self.passed,
            "compared": None if self.compared is None else self.compared.to_json(),
            "checks": {
                check.name: {
                    "passed": check.passed,
                    "checked": check.checked,
                    "faults": _listed(check.faults),
                    "greatest_error": check.greatest_error,
                    "tolerance": check.tolerance,
                }
                for check in self.checks
            },
        }

    def to_bytes(self) -> bytes:
        """The bytes of verification.json: equal findings give equal bytes."""
        return (json.dumps(self.to_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _listed(faults: tuple[str, ...]) -> list[str]:
    shown = [fault[:_MAX_FAULT_LENGTH] for fault in faults[:_MAX_FAULTS]]
    if len(faults) == _MAX_FAULTS + 1:  # the last line takes no more room than one that counts it
        return [fault[:_MAX_FAULT_LENGTH] for fault in faults]
    return shown if len(faults) <= _MAX_FAULTS else [*shown, f"and {len(faults) - _MAX_FAULTS} more"]


def write_verification(folder: Path, record: Verification) -> Path:
    """Writes the record into the artifact's folder, whole or not at all, and returns its path; raises RecordError."""
    path = folder / RECORD_NAME
    try:
        replace_file(path, record.to_bytes())
    except OSError as error:
        kind = ReadOnlyError if error.errno in _READ_ONLY else RecordError
        raise kind(
            f"{path} cannot be written: {error.strerror}; make the folder writable, or verify without leaving a "
            "record (--no-record)"
        ) from error
    return path


def read_verification(folder: Path) -> Verification | None:
    """The record in the artifact's folder, None if there is none; raises RecordError for anything but a record."""
    path = folder / RECORD_NAME
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            raise RecordError(f"{path} is not a regular file; remove it, or {_VERIFY_AGAIN}")
        if status.st_size > MAX_RECORD_NBYTES:
            raise RecordError(
                f"{path}: found {status.st_size} bytes, expected at most {MAX_RECORD_NBYTES}; {_VERIFY_AGAIN}"
            )
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error.strerror}; {_VERIFY_AGAIN}") from error
    return parse_verification(data)


def parse_verification(data: bytes) -> Verification:
    """The record in `data`, the bytes of verification.json.

    Raises RecordError, naming the JSON path, what was found and what was expected, for another format or version,
    unknown or missing keys, wrong types, unknown checks, and a verdict that its own faults contradict.
    """
    try:
        return _record(parse_json(data, RECORD_NAME))
    except ArtifactError as error:
        found = str(error).rpartition("; ")[0] or str(error)
        raise RecordError(f"{found}; {_VERIFY_AGAIN}") from error


def _record(root: Field) -> Verification:
    number = RECORD_VERSION
    if isinstance(root.value, dict) and "format" in root.value:
        version = root.child("format").members(("name", "version"))
        version["name"].choice((RECORD_FORMAT,))
        number = version["version"].integer()
        if not _OLDEST_VERSION <= number <= RECORD_VERSION:
            version["version"].fail(f"version {_OLDEST_VERSION} to {RECORD_VERSION}")
    compared = () if number == _OLDEST_VERSION else ("compared",)
    section = root.members(("format", "manifest_digest", "tool", "libraries", "passed", *compared, "checks"))
    if not _DIGEST.fullmatch(section["manifest_digest"].text()):
        section["manifest_digest"].fail("64 lower-case hexadecimal digits")
    libraries = section["libraries"]
    checks = section["checks"]
    unknown = [name for name in checks.mapping() if name not in CHECKS]
    if unknown or not checks.value:
        checks.fail(f"some of the checks {', '.join(CHECKS)}", f"{unknown[0]!r:.80}" if unknown else "none")
    record = Verification(
        manifest_digest=section["manifest_digest"].value,
        tool=section["tool"].name(),
        libraries={name: libraries.child(name).name() for name in libraries.mapping()},
        checks=tuple(_check(name, checks.child(name)) for name in CHECKS if name in checks.value),
        compared=section["compared"].optional(_compared) if compared else None,
    )
    _same_verdict(section["passed"], passed=record.passed)
    return record


def _compared(field: Field) -> Compared:
    computed = ("compute",) if "compute" in field.mapping() else ()
    member = field.members(("model", "lengths", "limit", "seed", *computed))
    lengths = member["lengths"].items(lambda length: length.integer(minimum=1))
    if not lengths or list(lengths) != sorted(set(lengths)):
        member["lengths"].fail("one length or more, ascending")
    return Compared(
        model="given" if member["model"].choice(("given", "rebuilt")) == "given" else "rebuilt",
        lengths=lengths,
        limit=member["limit"].optional(lambda limit: limit.integer(minimum=1)),
        seed=member["seed"].integer(),
        compute=member["compute"].choice((FLOAT32,)) if computed else None,
    )


def _check(name: str, field: Field) -> Check:
    member = field.members(("passed", "checked", "faults", "greatest_error", "tolerance"))
    check = Check(
        name=name,
        checked=member["checked"].integer(),
        faults=member["faults"].items(Field.name),
        greatest_error=member["greatest_error"].optional(_number),
        tolerance=member["tolerance"].optional(_number),
    )
    _same_verdict(member["passed"], passed=check.passed)
    tolerance = check.tolerance
    measured = check.greatest_error is not None and tolerance is not None and check.greatest_error <= tolerance
    if check.passed and tolerance is not None and not measured:
        member["greatest_error"].fail(f"at most {tolerance:g}, the tolerance, because there are no faults")
    return check


def _same_verdict(field: Field, *, passed: bool) -> None:
    if field.value is not passed:
        field.fail(f"{str(passed).lower()}, because there are {'no ' if passed else ''}faults")


def _number(field: Field) -> float:
    value = field.value
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < math.inf:
        field.fail("a number of at least 0")
    return float(value)
