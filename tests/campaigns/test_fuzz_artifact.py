"""A share of the reader's fuzz, and proof that it finds what it is for."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from furiosa_llm.runtime.artifact import files, parse, reader
from tests.campaigns import fuzz_artifact
from tests.campaigns.fuzz_artifact import Fuzzer, Result, campaign
from tests.support.artifacts import ROOT
from tests.support.runtime.artifact_damage import damage_manifest

SMALL = {"small": fuzz_artifact.MODELS["small"]}


@pytest.fixture
def fuzzer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fuzzer:
    monkeypatch.setattr(fuzz_artifact, "MODELS", SMALL)
    monkeypatch.setattr(fuzz_artifact, "SHARES", (1,))
    return Fuzzer(tmp_path)


def test_damaged_artifacts_are_refused_or_sound() -> None:
    """In a process of its own: the campaign forks, and this one may have threads, whose locks a fork would keep."""
    command = [sys.executable, "-m", "tests.campaigns.fuzz_artifact", "--cases", "200"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, ""), ended.stdout
    kinds = Counter({kind: int(count) for count, kind in re.findall(r"(\d+) (\w+)[,;]", ended.stdout)})
    assert ended.stdout.endswith("; 0 findings\n")
    assert kinds["ArtifactError"] > kinds.total() / 2
    assert kinds["same"] > 0


def test_what_is_stored_twice_or_never_is_found(fuzzer: Fuzzer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the proof of coverage. One manifest in a thousand passes the other checks: 939 is the first seed."""
    monkeypatch.setattr(parse, "check_coverage", lambda section, manifest: None)
    monkeypatch.setattr(fuzz_artifact, "DAMAGES", (damage_manifest,))
    assert any(fuzzer.case(seed).kind == "unsound" for seed in range(930, 6000))


def test_what_digests_should_tell_is_found(fuzzer: Fuzzer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the comparison of files with their digests."""
    monkeypatch.setattr(reader, "_check_digest", lambda folder, entry, found, what="": None)
    assert any(fuzzer.case(seed).kind == "wrong" for seed in range(1000))


def test_crashes_are_found(fuzzer: Fuzzer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the checks of what lies in the files' places."""
    monkeypatch.setattr(files, "not_regular", lambda path: KeyError(path.name))
    assert any(fuzzer.case(seed).kind == "crash" for seed in range(1000))


def test_a_case_without_an_end_and_one_that_ends_the_process_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def case(_: Fuzzer, seed: int) -> Result:
        if seed == 1:
            time.sleep(60)
        if seed == 3:
            os._exit(7)
        return Result(seed, "none", "same")

    monkeypatch.setattr(Fuzzer, "case", case)
    monkeypatch.setattr(fuzz_artifact, "LIMIT", 1)
    monkeypatch.setattr(fuzz_artifact, "MODELS", SMALL)
    found: dict[int, str] = {}
    for result in campaign(30):
        found[result.seed] = result.kind
        if result.seed == 5:
            break
    assert found == {0: "same", 1: "hang", 2: "same", 3: "death", 4: "same", 5: "same"}
