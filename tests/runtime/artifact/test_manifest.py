"""manifest.json: what is written is what is read, and each malformed field is refused where it stands."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from furiosa_llm.runtime.artifact.layout import Leaf, Mesh
from furiosa_llm.runtime.artifact.manifest import Manifest, seal
from furiosa_llm.runtime.artifact.parse import parse_manifest
from tests.support.runtime.models import LlamaSize, llama

Json = Any
Change = Callable[[Json], None]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = llama(Mesh((2, 2)), LlamaSize(layers=1)).write(tmp_path_factory.mktemp("artifact") / "a")
    return parse_manifest((folder / "manifest.json").read_bytes())


def test_what_is_written_is_read(manifest: Manifest) -> None:
    data = manifest.to_bytes()
    assert parse_manifest(data) == manifest
    assert parse_manifest(data).to_bytes() == data
    assert isinstance(manifest.tensors[0].layout, tuple)
    assert Leaf(8, (0, 1)) in (manifest.inputs[2].layout or ())


def test_the_plan_may_be_any_object(manifest: Manifest, tmp_path: Path) -> None:
    root = json.loads(manifest.to_bytes())
    root["plan"] = {"anything": [1, {"at": None}]}
    assert parse_manifest(seal(root)).plan == root["plan"]
