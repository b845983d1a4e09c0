"""A share of the kill campaign, and proof that it finds what it is for."""

from __future__ import annotations

from pathlib import Path

import pytest

from furiosa_llm.builder import ArtifactBuilder
from tests.builder.kill_campaign import MOMENTS, Campaign, campaign


@pytest.mark.slow
def test_killed_builds_leave_nothing_wrong(tmp_path: Path) -> None:
    tally = campaign(tmp_path, "build", seed=0).run(3)
    assert tally.violations == []
    assert set(tally.kills) == set(MOMENTS)
    assert tally.left.total() == 3


def test_the_campaign_finds_what_is_written_in_place(tmp_path: Path, zoo: Path) -> None:
    """A command that copies files one by one to where they are to be, and leaves a file beside them."""
    ArtifactBuilder(zoo / "tiny-llama-genai-fp32" / "model.onnx").build(tmp_path / "old")
    ArtifactBuilder(zoo / "tiny-llama-genai-fp32" / "model.onnx", "new").build(tmp_path / "new")

    def command(destination: Path, replacing: bool) -> list[str]:
        return [str(tmp_path / "new"), str(destination), str(replacing)]

    killed = Campaign(tmp_path, command, tmp_path / "old", seed=0, program="tests.builder.careless")
    tally = killed.run(6)
    assert any("does not open" in violation for violation in tally.violations)
    assert any(".started beside the artifact" in violation for violation in tally.violations)
