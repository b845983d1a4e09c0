"""A share of the loader's fuzz, and proof that it finds what it is for."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import pytest

from furiosa_llm.builder.source import load
from tests.campaigns.fuzz_loader import Fuzzer, models
from tests.support.builder import branching

CASES = 50


@pytest.mark.slow
def test_damaged_models_are_refused_or_right(tmp_path: Path) -> None:
    fuzzer = Fuzzer(tmp_path, models()[::4], branching.models())
    results = [fuzzer.case(seed) for seed in range(CASES)]
    assert [str(result) for result in results if result.finding is not None] == []
    kinds = Counter(result.kind for result in results)
    assert kinds["ModelLoadError"] > CASES / 5
    assert kinds["same"] > 0


def test_crashes_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the checks of the file's fields."""

    def unchecked(proto: onnx.ModelProto, name: str, left_out: object) -> None:
        assert proto.graph.node

    monkeypatch.setattr(load, "validate", unchecked)
    fuzzer = Fuzzer(tmp_path, [], branching.models())
    kinds = Counter(fuzzer.case(seed).kind for seed in range(20))
    assert kinds["crash"] > 0
