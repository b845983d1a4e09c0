"""The command line as a function, and an artifact to call it on."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from furiosa_llm.cli.main import main
from tests.support.artifacts import artifact_of

OPTIMUM = "tiny-llama-optimum"


@dataclasses.dataclass(frozen=True)
class Result:
    """What a command left behind."""

    code: int
    out: str
    err: str


Cli = Callable[..., Result]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    monkeypatch.setenv("COLUMNS", "200")  # so that no line is broken
    # A model that another test of this process has loaded is no reason to end the process.
    monkeypatch.setattr("furiosa_llm.cli.exit_code.end_at_once", sys.exit)

    def run(*arguments: object) -> Result:
        monkeypatch.setattr("sys.argv", ["furiosa-llm", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Result(ended.value.code, captured.out, captured.err)

    return run


@pytest.fixture
def refused(cli: Cli) -> Callable[..., str]:
    """Runs a command that must fail: one paragraph, no traceback, the given exit code."""

    def run(*arguments: object, code: int = 1) -> str:
        result = cli(*arguments)
        assert result.code == code
        assert "Traceback" not in result.err
        assert result.err.startswith("error: ")
        assert "\n\n" not in result.err.strip()
        return " ".join(result.err.split())

    return run


@pytest.fixture(scope="session")
def built() -> Path:
    """One artifact that tests may read."""
    return artifact_of(OPTIMUM)
