"""An end of the campaign, and that it finds what it looks for."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.campaigns import process_ends
from tests.campaigns.process_ends import WAYS, End, Ended, carry_out
from tests.support.artifacts import artifact_of


@pytest.mark.slow
def test_a_process_ends_with_its_own_status(tmp_path: Path) -> None:
    found = carry_out(End(run="steps", end="interrupt", seconds=0.05), artifact_of("tiny-llama-optimum"), tmp_path)
    assert not found.problem


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("print('ready'); raise SystemExit(3)", "it ended with 3, expected 1"),
        ("raise SystemExit(1)", "it never began, and ended with 1"),
        ("import sys; print('ready'); sys.exit('Fatal Python error: x')", "it says 'Fatal Python error'"),
        ("import time; print('ready', flush=True); time.sleep(9)", "it hangs: it has not ended after 2 s"),
        (
            "import subprocess as s; s.Popen(['sleep', '9']); print('ready'); raise SystemExit(1)",
            "these processes are left: ",
        ),
    ],
    ids=["status", "beginning", "abort", "hang", "process"],
)
def test_what_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str, problem: str) -> None:
    monkeypatch.setattr(process_ends, "command_of", lambda *_: [sys.executable, "-c", code])
    monkeypatch.setattr(process_ends, "SOON", 0.1)
    monkeypatch.setattr(process_ends, "_BOUND", 2.0)
    found: Ended = carry_out(End(run="generate", end="exception", seconds=0.0), tmp_path, tmp_path)
    assert problem in found.problem


def test_every_way_has_a_status() -> None:
    assert {end for _, end in WAYS} == set(process_ends.STATUS)
