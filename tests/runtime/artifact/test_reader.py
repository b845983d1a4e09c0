"""Artifacts that were cut short, altered or mixed up: refused, with what is wrong and what to do."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from furiosa_llm.runtime import LLM
from furiosa_llm.runtime.artifact import reader
from furiosa_llm.runtime.artifact.errors import ArtifactError
from furiosa_llm.runtime.artifact.files import open_regular
from furiosa_llm.runtime.artifact.layout import Leaf, Mesh
from furiosa_llm.runtime.artifact.reader import open_artifact
from furiosa_llm.runtime.artifact.source import read_source
from furiosa_llm.runtime.errors import TokenizerError
from tests.support.runtime.models import LlamaSize, llama, mlp
from tests.support.runtime.spmd import WEIGHTS, Spmd
from tests.support.tampering import edit_manifest

MESH = Mesh((2, 2))


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


def test_windows_of_a_shard_that_several_ranks_have(tmp_path: Path) -> None:
    program = Spmd(MESH)
    program.input("x", ["batch", 6])
    weight = np.arange(36, dtype=np.float32).reshape(6, 6)
    program.weight("w", weight, 6, Leaf(6, (1,)))
    program.node("MatMul", ["x", "w"], "h")
    program.all_gather("h", "g", (1,), 1, ["batch", 3])
    program.node("Identity", ["g"], "y")
    program.output("y", ["batch", 6])
    artifact = open_artifact(program.write(tmp_path / "artifact"))
    for rank, columns in enumerate((weight[:, :3], weight[:, 3:]) * 2):
        assert np.array_equal(artifact.read_window(artifact.window("w", rank)).view(np.float32).reshape(6, 3), columns)


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no artifact at .*: found nothing, expected the folder"):
        open_artifact(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="found a file"):
        open_artifact(tmp_path / "file")
    with pytest.raises(ArtifactError, match=r"it has no manifest\.json"):
        open_artifact(tmp_path)


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_small_weights_are_always_compared_with_their_digests(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flip_last_byte(folder / WEIGHTS)
    with pytest.raises(ArtifactError, match=f"{WEIGHTS} was altered in the tensor 'B'"):
        open_artifact(folder)
    open_artifact(folder, full=False)
    monkeypatch.setattr(reader, "FULL_BELOW_NBYTES", (folder / WEIGHTS).stat().st_size)
    open_artifact(folder)
    with pytest.raises(ArtifactError, match="was altered"):
        open_artifact(folder, full=True)


def test_the_digest_names_the_artifact(folder: Path) -> None:
    assert f'"digest": "{open_artifact(folder).digest}"' in (folder / "manifest.json").read_text()


def test_companions_are_the_listed_files(program: Spmd, folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    assert open_artifact(folder).companion("tokenizer.json") is None
    listed = mlp(MESH)
    listed.files = {"tokenizer.json": b"{}"}
    artifact = open_artifact(listed.write(tmp_path / "listed"))
    companion = artifact.companion("tokenizer.json")
    assert companion is not None
    assert companion.read_text("utf-8") == "{}"
    assert artifact.companion("config.json") is None


def test_a_tokenizer_that_merely_lies_there_is_not_read(tmp_path: Path, zoo: Path) -> None:
    folder = llama(Mesh((2,)), LlamaSize(layers=1)).write(tmp_path / "artifact")
    tokenizer = (zoo / "tiny-llama-optimum" / "tokenizer.json").read_bytes()
    (folder / "tokenizer.json").write_bytes(tokenizer)
    with (
        LLM.load_artifact(folder, skip_engine=True) as loaded,
        pytest.raises(TokenizerError, match=r"no tokenizer\.json"),
    ):
        loaded.tokenizer.encode("hello")


def test_a_file_that_becomes_a_fifo_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look at it and opening it."""
    (tmp_path / "regular").touch()
    os.mkfifo(tmp_path / "fifo")
    before = (tmp_path / "regular").lstat()
    monkeypatch.setattr(Path, "lstat", lambda path: before)
    raised: list[ArtifactError] = []

    def read() -> None:
        try:
            open_regular(tmp_path / "fifo").close()
        except ArtifactError as error:
            raised.append(error)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(5)
    assert not thread.is_alive()
    assert "is not a regular file" in str(raised[0])


def test_a_file_that_becomes_a_link_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "regular").touch()
    (tmp_path / "link").symlink_to("regular")
    before = (tmp_path / "regular").lstat()
    monkeypatch.setattr(Path, "lstat", lambda path: before)
    with pytest.raises(ArtifactError, match="link cannot be read: Too many levels of symbolic links; copy"):
        open_regular(tmp_path / "link")


def test_weights_that_are_cut_short_or_altered_while_the_artifact_is_open(folder: Path) -> None:
    """By somebody who gives the file its times of change back, as far as the system lets him."""
    artifact, path = open_artifact(folder), folder / WEIGHTS
    before, data = path.stat(), path.read_bytes()
    window = artifact.window("A", 0)
    expected = artifact.read_window(window)
    path.write_bytes(data)  # the same bytes, the tensor of which has its digest
    np.testing.assert_array_equal(artifact.read_window(window), expected)
    path.write_bytes(data[: window.offset] + bytes(len(data) - window.offset))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(ArtifactError, match="was altered in the tensor 'A'; copy the artifact again"):
        artifact.read_window(window)
    path.write_bytes(b"")
    with pytest.raises(ArtifactError, match="was cut short while the artifact was open"):
        artifact.read_window(window)


@pytest.mark.parametrize("becomes", ["nothing", "a link", "a FIFO", "another file"])
def test_what_names_stand_for_later_is_not_read(tmp_path: Path, becomes: str) -> None:
    program = mlp(MESH)
    program.files = {"tokenizer.json": b"{}"}
    folder = program.write(tmp_path / "artifact")
    artifact = open_artifact(folder)
    window = artifact.window("A", 0)
    expected = artifact.read_window(window)
    for name in (WEIGHTS, "tokenizer.json", "source.onnx"):
        path = folder / name
        path.unlink()
        if becomes == "a link":
            path.symlink_to("/dev/zero")
        elif becomes == "a FIFO":
            os.mkfifo(path)
        elif becomes == "another file":
            path.write_bytes(b"x")
    companion = artifact.companion("tokenizer.json")
    assert companion is not None
    assert companion.read_bytes() == b"{}"
    assert read_source(artifact).graph.initializer
    np.testing.assert_array_equal(artifact.read_window(window), expected)


def test_a_companion_that_is_altered_while_the_artifact_is_open(tmp_path: Path) -> None:
    program = mlp(MESH)
    program.files = {"tokenizer.json": b"{}"}
    folder = program.write(tmp_path / "artifact")
    companion = open_artifact(folder).companion("tokenizer.json")
    (folder / "tokenizer.json").write_bytes(b"[]")
    assert companion is not None
    with pytest.raises(ArtifactError, match=r"tokenizer\.json was altered: found sha256"):
        companion.read_bytes()


def test_giant_models_are_refused_unread(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "MAX_MODEL_NBYTES", 100)
    with pytest.raises(ArtifactError, match=r"program\.onnx is \d+ bytes long, expected at most 100; rebuild"):
        open_artifact(folder)


def test_giant_companions_are_refused_unread(tmp_path: Path) -> None:
    """They would be hashed for hours, and then read whole."""
    program = mlp(MESH)
    program.files = {"config.json": b"{}"}
    folder = program.write(tmp_path / "artifact")

    def stretch(manifest: dict[str, Any]) -> None:
        next(entry for entry in manifest["files"] if entry["path"] == "config.json")["nbytes"] = 2**40

    edit_manifest(folder, stretch)
    os.truncate(folder / "config.json", 2**40)
    with pytest.raises(ArtifactError, match=r"config\.json is 1099511627776 bytes long, expected at most 268435456"):
        open_artifact(folder)


def test_a_disk_that_fails(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(hashlib, "file_digest", failing)
    with pytest.raises(ArtifactError, match=r"cannot be read: Input/output error; check the disk and copy it again"):
        open_artifact(folder)
