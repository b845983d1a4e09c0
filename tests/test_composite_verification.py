"""What a composite artifact says of how its parts feed each other, where that is not what a build says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from furiosa_llm.composite_verification import fault_of_whole
from furiosa_llm.runtime.artifact.composite import open_composite
from furiosa_llm.runtime.artifact.manifest import seal
from tests.support.artifacts import artifact_of

PARTS = ("encoder", "decoder_first", "decoder")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A composite of its own, whose manifest each test writes anew."""
    return shutil.copytree(artifact_of("tiny-t5-optimum"), tmp_path_factory.mktemp("whole") / "artifact")


def exchange_states(root: Any) -> None:
    """Of two layers, each of the same shape."""
    first, second = root["states"][0], root["states"][4]
    first["first"], second["first"] = second["first"], first["first"]


def exchange_keys_and_values(root: Any) -> None:
    """What attention to the encoder keeps."""
    first, second = [state for state in root["states"] if state["output"] is None][:2]
    first["first"], second["first"] = second["first"], first["first"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (exchange_states, "$.states[0].first is "),
        (exchange_keys_and_values, ".first is "),
        (lambda root: root.update(decoder_start_token_id=7), "$.decoder_start_token_id is 7, expected 0"),
        (lambda root: root.update(eos_token_ids=[]), "$.eos_token_ids is [], expected [2]"),
    ],
)
def test_parts_put_together_otherwise(change: Callable[[Any], None], named: str, folder: Path) -> None:
    honest = (artifact_of("tiny-t5-optimum") / "manifest.json").read_bytes()
    (folder / "manifest.json").write_bytes(honest)
    assert fault_of_whole(folder) is None
    root = json.loads(honest)
    change(root)
    (folder / "manifest.json").write_bytes(seal(root))
    open_composite(folder)  # which is sound in itself
    assert named in (fault_of_whole(folder) or "")
