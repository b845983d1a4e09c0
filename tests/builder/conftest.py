"""Artifacts of the zoo, each opened once for all tests that look at it."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest

from furiosa_llm.builder import BuildReport
from furiosa_llm.runtime.artifact.reader import Artifact, open_artifact
from tests.artifacts import built_model

Built = Callable[[str, int], tuple[BuildReport, Artifact]]


@pytest.fixture(scope="session")
def built() -> Built:
    """The report and the artifact of a model (its path in the zoo) at a tensor parallel size; not to be changed."""

    @functools.cache
    def build(model: str, tensor_parallel_size: int) -> tuple[BuildReport, Artifact]:
        found = built_model(model, tensor_parallel_size)
        return found.report, open_artifact(found.folder, full=True)

    return build
