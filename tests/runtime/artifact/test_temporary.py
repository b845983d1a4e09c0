"""What a process leaves that is killed while it writes: nothing that the next one does not remove."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from furiosa_llm.runtime.artifact.manifest import RECORD_NAME
from furiosa_llm.runtime.artifact.reader import open_artifact
from furiosa_llm.runtime.artifact.temporary import replace_file, temporary_folder
from furiosa_llm.runtime.artifact.tools.record import Check, Verification, write_verification
from furiosa_llm.runtime.artifact.tools.unbuild import unbuild
from tests.campaigns.killed_at import Killer
from tests.support.artifacts import artifact_of


def killed(action: Callable[[], object], folder: Path, operation: int) -> bool:
    """Whether a process that does it was killed before that operation on files below `folder`."""
    process = os.fork()
    if not process:
        sys.addaudithook(Killer(folder, operation).audit)
        action()
        os._exit(0)
    _, status = os.waitpid(process, 0)
    assert status in (0, signal.SIGKILL)
    return status != 0


def listed(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def artifact(built: Path, tmp_path: Path) -> Path:
    return shutil.copytree(built, tmp_path / "artifact")


@pytest.fixture(scope="session")
def built() -> Path:
    return artifact_of("tiny-llama-optimum")


def test_a_file_that_is_replaced(tmp_path: Path) -> None:
    """Killed before each of its operations: it is the old or the new one, and the next run leaves nothing else."""
    path = tmp_path / "file"
    found, operation = set(), 1
    while True:
        path.write_bytes(b"old")
        if not killed(lambda: replace_file(path, b"new"), tmp_path, operation):
            break
        found.add(path.read_bytes())
        replace_file(path, b"newer")
        assert path.read_bytes() == b"newer"
        assert listed(tmp_path) == ["file"], operation
        operation += 1
    assert found == {b"old", b"new"}
    assert operation > 4


def test_a_verification_that_is_killed(artifact: Path) -> None:
    """While it records: the artifact opens, and the next record is alone."""
    files = listed(artifact)
    record = Verification(
        manifest_digest="0" * 64, tool="t", libraries={}, checks=(Check(name="structure", checked=1),)
    )
    operation = 1
    while killed(lambda: write_verification(artifact, record), artifact, operation):
        open_artifact(artifact)
        operation += 1
    write_verification(artifact, record)
    assert listed(artifact) == sorted([*files, RECORD_NAME])


def test_an_unbuild_that_is_killed(artifact: Path, tmp_path: Path) -> None:
    """As `verify --full` does it in the folder for temporary files."""
    opened, place = open_artifact(artifact), tmp_path / "place"

    def rebuild() -> None:
        with temporary_folder(place, "verify-") as folder:
            unbuild(opened, folder / "model.onnx")
            unbuild(opened, place / "model.onnx", force=True)

    place.mkdir()
    for operation in (1, 3, 4, 5, 6, 9, 12):
        assert killed(rebuild, place, operation)
        rebuild()
        assert listed(place) == ["model.onnx", "model.onnx.data"]


def test_what_is_used_or_not_ours_is_left(tmp_path: Path) -> None:
    for name, mode in (("x-own.tmp", 0o755), ("x-left.tmp", 0o700)):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(mode)
    (tmp_path / "x-link.tmp").symlink_to(tmp_path / "x-own.tmp")
    with temporary_folder(tmp_path, "x-") as first, temporary_folder(tmp_path, "x-") as second:
        assert listed(tmp_path) == sorted([first.name, second.name, "x-link.tmp", "x-own.tmp"])
    assert listed(tmp_path) == ["x-link.tmp", "x-own.tmp"]


def test_another_takes_a_folder_for_left_before_it_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open
    taken: list[str] = []

    def opened(path: str | Path, *arguments: int) -> int:
        if not taken:
            taken.append(str(path))
            Path(path).rmdir()
        return real(path, *arguments)

    monkeypatch.setattr(os, "open", opened)
    with temporary_folder(tmp_path, "x-") as folder:
        assert str(folder) not in taken
        assert listed(tmp_path) == [folder.name]


def test_a_file_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"old")

    def fail(_: Path, __: Path) -> None:
        raise OSError("full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="full"):
        replace_file(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert listed(tmp_path) == ["file"]
