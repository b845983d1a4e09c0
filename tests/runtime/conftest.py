"""Artifacts that several files of tests use."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest

from furiosa_llm.runtime.artifact.reader import Artifact, open_artifact
from tests.support.artifacts import artifact_of

ZooArtifact = Callable[[str], Artifact]
"""The artifact of a model of the zoo, for 4 PEs, by the name of its folder."""


@pytest.fixture(scope="session")
def zoo_artifact() -> ZooArtifact:
    """Opens what is asked for once."""
    return functools.cache(lambda name: open_artifact(artifact_of(name)))
