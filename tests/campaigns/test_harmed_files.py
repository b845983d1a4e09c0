"""A short run of the campaign."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.campaigns.harmed_files import WAYS, serve, served_model


@pytest.mark.slow
@pytest.mark.parametrize("way", [WAYS[1], WAYS[2]], ids=str)
def test_files_that_are_harmed_while_they_are_served(tmp_path: Path, way: dict[str, int]) -> None:
    rounds, wrong, death = serve(served_model(tmp_path / "model"), tmp_path, way, 8, random.Random(1))
    assert (wrong, death) == (0, "")
    assert rounds
