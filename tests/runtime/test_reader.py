"""Artifacts that were cut short, altered or mixed up: refused, with what is wrong and what to do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from furiosa_llm.runtime.artifact.errors import ArtifactError
from furiosa_llm.runtime.artifact.layout import Mesh
from furiosa_llm.runtime.artifact.reader import open_artifact
from tests.runtime.models import mlp
from tests.runtime.spmd import Spmd

MESH = Mesh((2, 2))
PROGRAM = "program.onnx"


@pytest.fixture(scope="module")
def program() -> Spmd:
    return mlp(MESH)


@pytest.fixture
def folder(program: Spmd, tmp_path: Path) -> Path:
    return program.write(tmp_path / "artifact")


def test_windows_are_the_ranks_own(program: Spmd, folder: Path) -> None:
    artifact = open_artifact(folder, full=True)
    for name, weight in program.weights.items():
        for rank in range(MESH.size):
            local = weight.local(MESH, rank)
            data = artifact.read_window(artifact.window(name, rank))
            assert np.array_equal(data.view(np.float32).reshape(local.shape), local)


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no artifact at .*: found nothing, expected the folder"):
        open_artifact(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="found a file"):
        open_artifact(tmp_path / "file")
    with pytest.raises(ArtifactError, match=r"it has no manifest\.json"):
        open_artifact(tmp_path)
