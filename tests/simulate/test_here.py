"""`make simulate-here` on a tiny artifact and a machine of round numbers: every load is predicted and run."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from benchmarks.simulate import here
from tests.simulate.conftest import small_machine
from tests.support.artifacts import artifact_of


def test_every_load_is_predicted_and_run(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = artifact_of("tiny-llama-genai-fp32", 4)
    monkeypatch.setattr(here, "artifact", lambda *_: SimpleNamespace(folder=folder))
    monkeypatch.setattr(here, "measure_this_machine", lambda **_: small_machine(len(os.sched_getaffinity(0))))
    monkeypatch.setattr(here, "_MODELS", {"genai-fp32": "tiny"})
    monkeypatch.setattr(here, "_USERS", {1: 1, 4: 4, 16: 16})
    monkeypatch.setattr(here, "_OPEN", 3)
    monkeypatch.setattr(here, "_OUTPUT", 4)
    result = CliRunner().invoke(here.main, ["--rounds", "1"])
    assert result.exit_code == 1, result.output  # the machine is made up
    assert "MISSED E2EL of 5 runs: median" in result.output
    for load in ("1 at once", "4 at once", "16 at once", "/s"):
        assert load in result.output
