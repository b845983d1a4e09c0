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
    artifact_of("tiny-llama-optimum", 8)  # built here, where it is kept for others
    command = [sys.executable, "-m", "tests.support.runtime.ray_scenario", "--nodes"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr[-4000:]
    found = json.loads(run.stdout.splitlines()[-1])
    losses = [found[name] for name in ("a stage killed", "a host powered off", "no host left, and one back")]
    for state in (found["loaded"], *(loss[-1] for loss in losses)):
        assert state["same"]  # the tokens of one process: at first, and after each loss
        assert state["hosts"] == 2  # a stage starts where it was, one of a lost host on a spare one
    for lost, *_ in losses:
        assert lost["cause"] == "StageError"
        assert re.search(r"stage [01] on \S+ \(\S+\) is lost", lost["error"])
        assert lost["seconds"] - lost["act"] < 5  # 1 on a quiet machine
    assert losses[-1][1] == {"ready": False, "dead": False, "engine": False}
    assert found["stages left after"] is not None
