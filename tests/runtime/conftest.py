"""Artifacts that several files of tests use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from furiosa_llm import ArtifactBuilder
from furiosa_llm.runtime.artifact.reader import Artifact, open_artifact

ZooArtifact = Callable[[str], Artifact]
"""The artifact of a model of the zoo, for 4 PEs, by the name of its folder."""


@pytest.fixture(scope="session")
def zoo_artifact(zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> ZooArtifact:
    """Builds what is asked for once."""
    found: dict[str, Artifact] = {}

    def build(name: str) -> Artifact:
        if name not in found:
            folder = tmp_path_factory.mktemp("zoo") / name
            ArtifactBuilder(zoo / name / "model.onnx", tensor_parallel_size=4).build(folder)
            found[name] = open_artifact(folder)
        return found[name]

    return build
