"""Which suite catches which seeded fault.

    python -m tests.seeded_faults [--suite hinted|fast|all] [--only NAME] [--jobs N] [--markdown FILE]

The hinted tests must pass without a fault. Then every fault is put into a scratch copy of the tree, and tests are run
there until one fails: the hinted ones, then the rest of the fast suite, then the others. What catches a fault is a
test that fails; a file that cannot be imported, or a fixture that fails, is an error of this table. Ends with status 1
if the fast suite catches less than nine of ten faults, or no suite catches one.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.seeded_faults.fault import Fault
from tests.seeded_faults.report import Verdict, line, replace_table, shortfalls, summary
from tests.seeded_faults.running import FAST, REST, BrokenRunError, copy_of_the_tree, copy_with, run_tests
from tests.seeded_faults.table import FAULTS

SUITES = {"hinted": (), "fast": (FAST,), "all": (FAST, REST)}
"""The marks of the tests that a fault meets which the hinted ones do not catch, whole suites one after another."""


class _Bench:
    """The sound copy of the tree in a scratch folder, and a copy of it for each fault as long as its tests run."""

    def __init__(self, folder: Path, jobs: int) -> None:
        self._folder = folder
        self._jobs = jobs
        self._sound = folder / "sound"
        copy_of_the_tree(self._sound)

    def check_sound(self, tests: Sequence[str], marks: str) -> None:
        """Raises BrokenRunError if a test fails without a fault."""
        if failed := run_tests(self._sound, tests, marks, *self._together()):
            raise BrokenRunError(f"without a fault fail {', '.join(failed)}")

    def hinted(self, faults: Sequence[Fault]) -> list[Verdict]:
        """What the hinted tests find, several faults at a time."""
        with ThreadPoolExecutor(self._jobs) as pool:
            return list(pool.map(lambda fault: self._meet(fault, fault.hints, FAST), faults))

    def suite(self, verdict: Verdict, marks: str) -> Verdict:
        """What a whole suite finds of a fault that nothing has caught."""
        found = self._meet(verdict.fault, (), marks, *self._together())
        return dataclasses.replace(found, seconds=verdict.seconds + found.seconds)

    def _together(self) -> tuple[str, ...]:
        return ("--numprocesses", str(self._jobs), "--dist", "worksteal")

    def _meet(self, fault: Fault, tests: Sequence[str], marks: str, *options: str) -> Verdict:
        started = time.monotonic()
        verdict = Verdict(fault=fault, seconds=0)
        with tempfile.TemporaryDirectory(dir=self._folder) as scratch:
            tree = Path(scratch, "tree")
            copy_with(fault, self._sound, tree)
            try:
                failed = run_tests(tree, tests, marks, "--exitfirst", *options)
            except BrokenRunError as error:
                verdict = dataclasses.replace(verdict, broken=str(error))
            else:
                if failed:
                    verdict = dataclasses.replace(verdict, test=failed[0], is_fast=marks == FAST)
        verdict = dataclasses.replace(verdict, seconds=time.monotonic() - started)
        sys.stdout.write(f"{line(verdict)}\n")
        sys.stdout.flush()
        return verdict


def judge(faults: Sequence[Fault], suite: str, jobs: int) -> list[Verdict]:
    """What becomes of each of `faults`; raises BrokenRunError if a test that is to catch them fails without one."""
    with tempfile.TemporaryDirectory(prefix="seeded-faults-") as folder:
        bench = _Bench(Path(folder), jobs)
        bench.check_sound([*dict.fromkeys(hint for fault in faults for hint in fault.hints)], FAST)
        verdicts = bench.hinted(faults)
        for marks in SUITES[suite]:
            survivors = [n for n, one in enumerate(verdicts) if one.test is None and not one.broken]
            if survivors:
                bench.check_sound((), marks)
            for number in survivors:
                verdicts[number] = bench.suite(verdicts[number], marks)
    return verdicts


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Tell which suite catches which seeded fault.")
    parser.add_argument("--suite", choices=SUITES, default="all", help="how far to go where hints do not do")
    parser.add_argument("--only", metavar="NAME", choices=[fault.name for fault in FAULTS], help="of one fault")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes at once")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="the file to put the table into")
    arguments = parser.parse_args()
    faults = [fault for fault in FAULTS if arguments.only in (None, fault.name)]
    try:
        verdicts = judge(faults, arguments.suite, arguments.jobs)
    except BrokenRunError as error:
        parser.exit(1, f"{error}\n")
    if arguments.markdown is not None:
        replace_table(arguments.markdown, verdicts)
    sys.stdout.write("\n".join([*shortfalls(verdicts), summary(verdicts)]) + "\n")
    return 1 if shortfalls(verdicts) else 0


if __name__ == "__main__":
    sys.exit(main())
