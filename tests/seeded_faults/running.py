"""Runs tests in scratch copies of the tree: the checkout is never changed, and only the copy is imported."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.seeded_faults.fault import Fault

ROOT = Path(__file__).resolve().parents[2]

FAST = "not real_model and not slow and not browser and not release"
"""What `make test` runs; `make test-all` runs the rest too."""
REST = "(real_model or slow or browser) and not release"

_MADE_BY_TESTS = ("build", ".pytest_cache", ".hypothesis")
"""Not copied on: what tests keep for the next run was made by other sources."""
_NOT_NEEDED = ("-p", "no:schemathesis")
"""A plugin that takes as long to load as many tests take to fail."""
NO_JUDGES = ("tests/test_seeded_faults.py", "tests/runtime/engine/test_scheduler_mutations.py")
"""They look for the text that a fault replaces, and would fail for that alone."""
_PASSED, _NONE_SELECTED = 0, 5


class BrokenRunError(Exception):
    """Tests did not run, or something else than a test failed."""


def copy_of_the_tree(target: Path) -> None:
    """Copies what git has, or would take, to `target`, whose packages are then found there by the path alone.

    The editable install is the last to be asked for a package, and maps some of them to the checkout.
    """
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    for package in ("builder", "runtime"):
        (target / "furiosa_llm" / package).symlink_to(Path("..", package))


def copy_with(fault: Fault, sound: Path, target: Path) -> None:
    """Copies the tree at `sound` with `fault` in it; what Python compiled of the other files comes along."""
    shutil.copytree(sound, target, symlinks=True, ignore=shutil.ignore_patterns(*_MADE_BY_TESTS))
    (target / fault.file).write_text(fault.source(sound), encoding="utf-8")


def run_tests(tree: Path, tests: Sequence[str], marks: str, *options: str) -> list[str]:
    """The tests that failed, of `tests` (none given: all) with these `marks`; BrokenRunError if anything else did."""
    outcomes = tree / "outcomes.json"
    outcomes.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "tests.seeded_faults.inside", *_NOT_NEEDED]
    command += [f"--ignore={file}" for file in NO_JUDGES]
    run = subprocess.run(
        [*command, "--outcomes", str(outcomes), "-m", marks, *options, *tests],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    found = json.loads(outcomes.read_text()) if outcomes.exists() else {"failed": [], "errors": []}
    if not found["failed"] and run.returncode not in (_PASSED, _NONE_SELECTED):
        said = (run.stdout + run.stderr)[-3000:]
        raise BrokenRunError(f"exit code {run.returncode}, errors in {found['errors'][:3]}:\n{said}")
    failed: list[str] = found["failed"]
    return failed
