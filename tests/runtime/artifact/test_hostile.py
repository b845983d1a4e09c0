"""Every kind of hostile artifact is refused, and says why: the field, what was found, what was expected, what to do."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from furiosa_llm.runtime.artifact.errors import ArtifactError
from furiosa_llm.runtime.artifact.layout import Mesh
from furiosa_llm.runtime.artifact.reader import open_artifact
from tests.support.artifacts import artifact_of
from tests.support.runtime import hostile_files, hostile_layouts, hostile_manifest, hostile_models, hostile_sources
from tests.support.runtime.hostile import Copy, Hostile
from tests.support.runtime.models import LlamaSize, llama, mlp

KINDS = tuple(
    kind
    for module in (hostile_files, hostile_manifest, hostile_layouts, hostile_models, hostile_sources)
    for kind in module.KINDS
)
MESH = Mesh((2, 2))
BASES: dict[str, Callable[[Path], object]] = {
    "mlp": lambda folder: mlp(MESH).write(folder),
    "llama": lambda folder: llama(MESH, LlamaSize(layers=1)).write(folder),
    "parts": lambda folder: shutil.copytree(artifact_of("tiny-llama-genai-fp16-cuda", 8), folder),
    "padded": lambda folder: shutil.copytree(artifact_of("tiny-llama-9-3-optimum"), folder),
    "int4": lambda folder: shutil.copytree(artifact_of("tiny-llama-genai-int4-qdq"), folder),
}
"""What is damaged: small programs written by hand; built ones with weights in parts, padded heads, and packed INT4."""


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def base(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("hostile") / name
            BASES[name](made[name])
        return made[name]

    return base


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_it_is_refused(kind: Hostile, bases: Callable[[str], Path], tmp_path: Path) -> None:
    copy = Copy(tmp_path / "artifact")
    shutil.copytree(bases(kind.base), copy.folder)
    kind.apply(copy)
    if kind.full:
        open_artifact(copy.folder, full=False)
    with pytest.raises(ArtifactError) as caught:
        open_artifact(copy.folder, full=kind.full)
    text = str(caught.value)
    assert re.search(kind.message, text), text
    assert re.search("rebuild|copy the artifact", text), text
    assert len(text) < 1500
    assert text.isprintable()


@pytest.mark.parametrize("base", BASES)
def test_it_is_refused_for_the_damage_alone(base: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    """Writing manifest, models and header again without a change is no reason."""
    copy = Copy(tmp_path / "artifact")
    shutil.copytree(bases(base), copy.folder)
    copy.model("program.onnx", lambda model: None)
    copy.model("source.onnx", lambda model: None)
    copy.refresh()
    assert open_artifact(copy.folder, full=True).manifest.tensors == open_artifact(bases(base)).manifest.tensors


def test_there_are_many_kinds_each_with_a_name_of_its_own() -> None:
    assert len(KINDS) >= 90
    assert len({kind.name for kind in KINDS}) == len(KINDS)
