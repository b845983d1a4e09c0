"""A few kinds of the campaign: one that runs for ever, one that takes all memory, one that does while it is loaded."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.campaigns.hostile_programs import NBYTES, ask, honest_artifact
from tests.support.runtime.endless import KINDS, make_endless


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return honest_artifact(tmp_path_factory.mktemp("honest") / "artifact")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("an endless Loop", "StepTimeoutError"),
        ("12 times 1 GiB at once", "Available memory"),
        ("12 GiB of constants", "Available memory"),
    ],
)
def test_it_ends_with_an_error(honest: Path, tmp_path: Path, kind: str, error: str) -> None:
    folder = shutil.copytree(honest, tmp_path / "artifact")
    make_endless(folder, kind)
    outcome = ask(folder, step_timeout=1.0)
    assert outcome.error is not None
    assert error in outcome.error
    assert outcome.nbytes < ask(honest).nbytes + NBYTES


def test_there_are_many_kinds() -> None:
    assert len(KINDS) >= 30
