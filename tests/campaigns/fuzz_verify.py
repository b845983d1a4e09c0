"""Semantic changes of programs, each with all digests made right again: which check of `furiosa-llm verify` sees it.

    python -m tests.campaigns.fuzz_verify

Every kind in `tests/support/runtime/mutations.py` and `mutations_of_others.py` is made on copies of artifacts, which
`verify --full` then checks, with a seed from the system. The table says which checks found it: the static proof; the
default's comparison with source.onnx lowered again; and, of `--full`, the outputs alone, as if the rest had not been
there. A kind that `--full` passes is a finding, and the campaign ends with status 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from furiosa_llm.composite_verification import verify_composite
from furiosa_llm.parity_options import ParityOptions
from furiosa_llm.runtime.artifact.composite import is_composite
from furiosa_llm.runtime.artifact.manifest import MANIFEST_NAME, manifest_digest
from furiosa_llm.verification import Report, verify_artifact
from tests.support.runtime.mutations import Mutation
from tests.support.runtime.mutations_of_others import base, kinds
from tests.support.runtime.program_edits import Program
from tests.support.tampering import edit_manifest

OUTPUTS = ("stitched", "executor", "tokens", "engine")


@dataclass(frozen=True, slots=True)
class Result:
    """What the checks of one kind on one model found: the names of those that failed, with their first faults."""

    kind: Mutation
    model: str
    failed: dict[str, str]

    @property
    def by_reader(self) -> bool:
        """Whether the artifact could not even be opened."""
        return "structure" in self.failed

    @property
    def by_proof(self) -> bool:
        """Whether program and manifest alone contradict it."""
        return "proof" in self.failed

    @property
    def by_default(self) -> bool:
        """Whether `verify` without options finds it."""
        return any(name not in OUTPUTS for name in self.failed)

    @property
    def by_outputs(self) -> bool:
        """Whether outputs show it."""
        return any(name in OUTPUTS for name in self.failed)

    def row(self) -> str:
        """A line of the table."""
        columns = (self.by_proof, self.by_default, self.by_outputs, bool(self.failed))
        marks = "".join(f"{'yes' if mark else '-':<9}" for mark in columns)
        note = " (refused by the reader)" if self.by_reader else " (neutral)" if self.kind.neutral else ""
        return f"{self.kind.name:<62}{self.model:<46}{marks}{note}"


def judge(kind: Mutation, model: str, folder: Path, options: ParityOptions) -> Result:
    """Makes a change in a copy in `folder`, and checks it."""
    shutil.copytree(base(model), folder)
    whole = is_composite(folder)
    program = Program(folder / kind.part if whole else folder)
    kind.apply(program)
    program.save()
    options = dataclasses.replace(options, compute=kind.compute)
    if not whole:
        return Result(kind, model, _failed([verify_artifact(folder, full=True, options=options)]))
    edit_manifest(folder, lambda manifest: _name_parts(manifest, folder))
    found = verify_composite(folder, full=True, options=options)
    failed = _failed(found.parts.values()) | ({} if found.fault is None else {"whole": found.fault})
    return Result(kind, model, failed)


def _name_parts(manifest: dict[str, Any], folder: Path) -> None:
    for part in manifest["parts"]:
        part["digest"] = manifest_digest((folder / part["name"] / MANIFEST_NAME).read_bytes())


def _failed(reports: Iterable[Report]) -> dict[str, str]:
    checks = [check for report in reports for check in report.record.checks]
    return {check.name: check.faults[0] for check in checks if not check.passed}


def campaign(names: Sequence[str], options: ParityOptions) -> Iterator[Result]:
    """Every kind on every model that it is for."""
    with tempfile.TemporaryDirectory(prefix="furiosa-llm-fuzz-verify-") as temporary:
        for name in names:
            for model in kinds()[name].models:
                folder = Path(temporary) / "artifact"
                yield judge(kinds()[name], model, folder, options)
                shutil.rmtree(folder)


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> int:
    """Runs the campaign; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--kind", action="append", help="one kind only; may be repeated")
    parser.add_argument("--seed", type=int, help="of lengths and inputs; by default one from the system")
    parser.add_argument("--faults", action="store_true", help="show what the checks said")
    options = parser.parse_args()
    parity = ParityOptions(seed=options.seed, max_tokens=4, prompts=("hello",))
    _say(f"{'kind':<62}{'model':<46}{'proof':<9}{'default':<9}{'outputs':<9}{'--full':<9}")
    findings = count = 0
    for result in campaign(options.kind or list(kinds()), parity):
        count += 1
        findings += not result.failed
        _say(result.row())
        if options.faults:
            for name, fault in result.failed.items():
                _say(f"    {name}: {fault}")
    _say(f"{len(options.kind or kinds())} kinds, {count} artifacts; {findings} findings")
    return int(findings > 0)


if __name__ == "__main__":
    sys.exit(main())
