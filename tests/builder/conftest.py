"""Artifacts of the zoo, each built once for all tests that look at it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from furiosa_llm.builder import ArtifactBuilder, BuildReport
from furiosa_llm.runtime.artifact.reader import Artifact, open_artifact

Built = Callable[[str, int], tuple[BuildReport, Artifact]]


@pytest.fixture(scope="session")
def built(zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The report and the artifact of a model (its path in the zoo) at a tensor parallel size; not to be changed."""

    @functools.cache
    def build(model: str, tensor_parallel_size: int) -> tuple[BuildReport, Artifact]:
        folder = tmp_path_factory.mktemp("built") / "artifact"
        path = zoo / model if model.endswith(".onnx") else zoo / model / "model.onnx"
        report = ArtifactBuilder(path, tensor_parallel_size=tensor_parallel_size).build(folder)
        return report, open_artifact(folder, full=True)

    return build
