"""Stages as actors of Ray: on the hosts that the devices name, started anew where there is room, ended at the end."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from tests.support.artifacts import ROOT, artifact_of


@pytest.mark.slow
def test_a_replica_over_hosts_that_are_lost() -> None:
    """Three nodes of one card each here; two stages of one card each. See tests/support/runtime/ray_scenario.py."""
    artifact = artifact_of("tiny-llama-optimum", 8)
    command = [sys.executable, "-m", "tests.support.runtime.ray_scenario", str(artifact)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr[-4000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["same"] == [True] * 4  # the tokens of one process: at first, and after each loss
    assert found["nodes"] == [2] * 4  # an actor starts where it was, a stage of a lost host on a spare one
    for loss in ("actor", "node", "none left"):
        assert found[loss]["cause"] == "StageError"
        assert re.search(r"stage 1 on \S+ \(\S+\) is lost", found[loss]["error"])
        assert found[loss]["seconds"] - found[loss]["act"] < 5  # 1 on a quiet machine
    assert found["waits"] == [False, True, False]  # not ready, not dead; the engine is not ready either
