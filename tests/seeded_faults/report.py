"""What became of the faults: for a terminal, and as the table in docs/testing.md."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.seeded_faults.fault import Fault

LEAST_SHARE = 0.9
"""Of the faults, that the fast suite has to catch."""

_BEGIN = "<!-- seeded faults: made by `python -m tests.seeded_faults --markdown` -->\n"
_END = "<!-- end of seeded faults -->\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """`test` is the first test that failed with the fault, of the fast suite or not; None if none did.

    `broken` is what else went wrong, empty if nothing did.
    """

    fault: Fault
    seconds: float
    test: str | None = None
    is_fast: bool = False
    broken: str = ""


def shortfalls(verdicts: Sequence[Verdict]) -> list[str]:
    """In what the suites fall short; nothing if they do not."""
    found = [f"{one.fault.name}: {one.broken}" for one in verdicts if one.broken]
    found += [f"{one.fault.name}: no test fails" for one in verdicts if one.test is None and not one.broken]
    num_fast = sum(one.is_fast for one in verdicts)
    if num_fast < LEAST_SHARE * len(verdicts):
        found.append(f"the fast suite catches {num_fast} of {len(verdicts)}, expected {LEAST_SHARE:.0%}")
    return found


def summary(verdicts: Sequence[Verdict]) -> str:
    """How many faults which suite catches."""
    num_fast, num_all = sum(one.is_fast for one in verdicts), sum(one.test is not None for one in verdicts)
    return f"{len(verdicts)} faults: the fast suite catches {num_fast}, all tests {num_all}."


def line(verdict: Verdict) -> str:
    """One fault for a terminal."""
    fault, test = verdict.fault, verdict.test or "NOTHING"
    suite = "fast" if verdict.is_fast else "all" if verdict.test else "-"
    return f"{verdict.seconds:5.1f} s  {suite:4}  {fault.name} | {fault.file} | {'BROKEN' if verdict.broken else test}"


def markdown(verdicts: Iterable[Verdict]) -> str:
    """The table; of a test with parameters it has the name alone."""
    rows = [
        f"| {one.fault.name} | `{one.fault.file}` | {one.fault.effect} "
        f"| {'fast' if one.is_fast else 'all'} | `{(one.test or 'none').partition('[')[0]}` |"
        for one in verdicts
    ]
    head = ["| fault | where | what a user would see | caught by | first test that fails |", "|---|---|---|---|---|"]
    return "\n".join([*head, *rows]) + "\n"


def replace_table(file: Path, verdicts: Sequence[Verdict]) -> None:
    """Puts summary and table between the two marks in `file`."""
    before, _, rest = file.read_text(encoding="utf-8").partition(_BEGIN)
    _, _, after = rest.partition(_END)
    table = f"{_BEGIN}{summary(verdicts)}\n\n{markdown(verdicts)}{_END}"
    file.write_text(f"{before}{table}{after}", encoding="utf-8")
