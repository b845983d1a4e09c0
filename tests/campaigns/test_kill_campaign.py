"""A share of the kill campaign, and proof that it finds what it is for."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from furiosa_llm.builder import ArtifactBuilder
from tests.campaigns.kill_campaign import MOMENTS, Campaign, campaign

pytestmark = pytest.mark.slow


def test_killed_builds_leave_nothing_wrong(tmp_path: Path) -> None:
    tally = campaign(tmp_path, "build", seed=0).run(3)
    assert tally.violations == []
    assert set(tally.kills) == set(MOMENTS)
    assert tally.left.total() == 3


@pytest.fixture(scope="module")
def careless(zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Campaign:
    """Against a command that copies `new` file by file to where it is to be, and leaves a file beside it."""
    folder = tmp_path_factory.mktemp("careless")
    for name in ("old", "new", "other"):
        ArtifactBuilder(zoo / "tiny-llama-genai-fp32" / "model.onnx", name).build(folder / name)

    def command(destination: Path, replacing: bool) -> list[str]:
        return [str(folder / "new"), str(destination), str(replacing)]

    return Campaign(folder, command, folder / "old", seed=0, program="tests.campaigns.careless")


def test_the_campaign_finds_what_is_written_in_place(careless: Campaign) -> None:
    tally = careless.run(6)
    assert any("does not open" in violation for violation in tally.violations)
    assert any(".started beside the artifact" in violation for violation in tally.violations)


def test_the_campaign_finds_artifacts_that_should_not_be_there(careless: Campaign) -> None:
    artifacts = careless.destination.parent.parent
    found = {}
    for name in ("old", "new", "other"):
        shutil.rmtree(careless.destination)
        shutil.copytree(artifacts / name, careless.destination)
        found[name] = [len(careless.left(replacing=replacing)) for replacing in (False, True)]
    assert found == {"old": [1, 0], "new": [0, 0], "other": [1, 1]}
