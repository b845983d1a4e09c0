"""Artifacts copied to where stages run: only what a stage reads, compared, resumed, and refused by name."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from furiosa_llm.runtime.artifact.errors import ArtifactError
from furiosa_llm.runtime.artifact.layout import Mesh
from furiosa_llm.runtime.artifact.reader import Artifact, open_artifact
from furiosa_llm.runtime.distributed import artifact_cache
from furiosa_llm.runtime.distributed.artifact_cache import ArtifactCache, ArtifactSource, Fetch, fetching
from furiosa_llm.runtime.distributed.wire import Opening
from furiosa_llm.runtime.errors import StageError, WireError
from furiosa_llm.runtime.placement.stages import Stage, choose_stages
from furiosa_llm.runtime.runners.batch import Decode, Row
from furiosa_llm.runtime.runners.loaded_model import stage_tensors
from tests.support.runtime.blocks import llama_blocks
from tests.support.runtime.models import LlamaSize
from tests.support.runtime.stages import ANY_PORT, TOKEN, opening_of, running, serving_stages

MESH = Mesh((2, 2))
STAGE = Stage(index=0, first_block=0, num_blocks=1, first_node=0, stop_node=9, cost_nbytes=0, weight_nbytes=0)


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    return llama_blocks(MESH, LlamaSize(layers=4), tmp_path / "head")


@pytest.fixture
def source(artifact: Artifact) -> Iterator[ArtifactSource]:
    with ArtifactSource(artifact, ANY_PORT, TOKEN) as found:
        yield found


def nbytes_of(artifact: Artifact, names: frozenset[str]) -> int:
    tensors = [artifact.tensors[name] for name in names]
    return sum(tensor.local_nbytes * MESH.parts(tensor.shard_axes) for tensor in tensors)


def named(artifact: Artifact, stage: int) -> frozenset[str]:
    return stage_tensors(artifact, choose_stages(artifact, pipeline_parallel_size=2), stage)


def cache_of(root: Path, artifact: Artifact, stage: Stage = STAGE) -> ArtifactCache:
    return ArtifactCache(root, artifact.digest, stage)


def counted(fetch: Fetch, read: list[tuple[str, int]], *, most: int | None = None) -> Fetch:
    """`fetch`, whose reads of weights are noted, and that fails after `most` of them."""

    def count(name: str, offset: int, nbytes: int) -> memoryview:
        data = fetch(name, offset, nbytes)
        if name.endswith(".safetensors"):
            if most is not None and len(read) >= most:
                raise StageError("the head is gone")
            read.append((name, data.nbytes))
        return data

    return count


def test_stages_copy_what_they_read(artifact: Artifact, source: ArtifactSource, tmp_path: Path) -> None:
    folders = [tmp_path / "cache" / str(stage) for stage in range(2)]
    with serving_stages(2) as servers:
        opening = opening_of(artifact, [server.address for server in servers])
        batch = Decode(group=0, copies=(), rows=(Row(sequence_id=0, start=0, token=3),))
        with running(opening) as runner:
            expected = runner.submit(batch).result(60).copy()
        copying: Opening = replace(opening, source=source.address, verify=True)
        for _ in range(2):  # once copied, and once found
            with running(copying, folders=folders) as runner:
                assert np.array_equal(runner.submit(batch).result(60), expected)
    own = sum(nbytes_of(artifact, named(artifact, stage)) for stage in range(2))
    others = sum(entry.nbytes for entry in artifact.manifest.files if not entry.path.endswith(".safetensors"))
    assert own < source.sent_nbytes < 1.05 * own + 4 * others
    for stage, folder in enumerate(folders):
        cache = cache_of(folder, artifact, choose_stages(artifact, pipeline_parallel_size=2)[stage])
        copied = open_artifact(cache.folder, full=False)
        for name in artifact.tensors:
            window = copied.window(name, 0)
            found = copied.files.read(window.file, window.offset, window.nbytes)
            if name in named(artifact, stage):
                assert np.array_equal(found, artifact.read_window(window))
            else:
                assert not found.any()  # a hole


def test_an_interrupted_copy_is_resumed(artifact: Artifact, source: ArtifactSource, tmp_path: Path) -> None:
    cache = cache_of(tmp_path / "cache", artifact)
    names = named(artifact, 0)
    before: list[tuple[str, int]] = []
    after: list[tuple[str, int]] = []
    with fetching(source.address, TOKEN) as fetch:
        with pytest.raises(StageError, match="the head is gone"):
            cache.fill(counted(fetch, before, most=12), lambda _: names, verify=False)
        with cache.folder.with_name(f"{cache.folder.name}.copied").open("a") as journal:
            journal.write('"half a na')  # the line that the end of the process cut off
        cache.fill(counted(fetch, after), lambda _: names, verify=False)
        whole = nbytes_of(artifact, names)
        assert 0 < sum(nbytes for _, nbytes in after) < whole
        again: list[tuple[str, int]] = []
        cache.fill(counted(fetch, again), lambda _: names, verify=False)
        assert again == []
        more = named(artifact, 1) - names
        cache.fill(counted(fetch, again), lambda _: names | more, verify=True)
        assert sum(nbytes for _, nbytes in again) == nbytes_of(artifact, more)


def test_a_tensor_that_was_altered_here_is_copied_again(
    artifact: Artifact, source: ArtifactSource, tmp_path: Path
) -> None:
    cache = cache_of(tmp_path / "cache", artifact)
    names = named(artifact, 1)
    read: list[tuple[str, int]] = []
    with fetching(source.address, TOKEN) as fetch:
        cache.fill(fetch, lambda _: names, verify=True)
        window = artifact.window("head", 0)
        with (cache.folder / window.file).open("r+b") as file:
            file.seek(window.offset)
            file.write(b"\xff")
        cache.fill(counted(fetch, read), lambda _: names, verify=True)
    assert len(read) == 1
    assert open_artifact(cache.folder, full=False).check_tensor("head").size == read[0][1]


def test_a_tensor_that_was_altered_at_the_head_is_refused(
    artifact: Artifact, source: ArtifactSource, tmp_path: Path
) -> None:
    window = artifact.window("head", 0)
    with (artifact.folder / window.file).open("r+b") as file:
        file.seek(window.offset)
        file.write(b"\xff")
    with serving_stages(1) as servers:
        opening = replace(opening_of(artifact, [servers[0].address]), source=source.address)
        with (
            pytest.raises(ArtifactError, match=r"stage 0 on host0: the tensor 'head' of .* comes from the head with"),
            running(opening, folders=[tmp_path / "cache"]),
        ):
            pass


@pytest.mark.parametrize(
    ("number", "message"),
    [(errno.ENOSPC, "No space left on device; free some of it, or"), (errno.EIO, "Input/output error; give a folder")],
)
def test_a_full_disk_is_said_by_name(
    number: int,
    message: str,
    artifact: Artifact,
    source: ArtifactSource,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(_: int) -> None:
        raise OSError(number, os.strerror(number))

    cache = cache_of(tmp_path / "cache", artifact)
    names = named(artifact, 0)
    with fetching(source.address, TOKEN) as fetch:
        with monkeypatch.context() as patched:
            patched.setattr(os, "fdatasync", fail)
            with pytest.raises(ArtifactError, match=f"the artifact cannot be copied to .*: {message}"):
                cache.fill(fetch, lambda _: names, verify=False)
        cache.fill(fetch, lambda _: names, verify=True)  # there is room again


def test_a_cache_that_is_a_file(artifact: Artifact, source: ArtifactSource, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with fetching(source.address, TOKEN) as fetch, pytest.raises(ArtifactError, match="Not a directory; give a folder"):
        cache_of(tmp_path / "file", artifact).fill(fetch, lambda _: (), verify=False)


@pytest.mark.parametrize("digest", ["../other", "", "A" * 64])
def test_a_folder_has_the_name_of_a_digest(digest: str, tmp_path: Path) -> None:
    with pytest.raises(WireError, match="is no digest"):
        ArtifactCache(tmp_path, digest, STAGE)


@pytest.mark.parametrize(
    ("name", "offset", "nbytes", "message"),
    [
        ("../secret", 0, 9, "'../secret' is no file of the artifact"),
        ("manifest.json", -1, 9, "and none at -1"),
        ("manifest.json", 0, -9, "and none at 0"),
        ("manifest.json", 2**40, 9, "and none at 1099511627776"),
    ],
)
def test_the_head_sends_its_artifact_and_nothing_else(
    name: str, offset: int, nbytes: int, message: str, source: ArtifactSource
) -> None:
    with fetching(source.address, TOKEN) as fetch:
        with pytest.raises(WireError, match=message):
            fetch(name, offset, nbytes)
        assert bytes(fetch("manifest.json", 0, 1)) == b"{"
        assert fetch("manifest.json", 0, 2**50).nbytes < 2**20


def test_a_head_that_is_gone(artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifact_cache, "_ANSWER_MS", 100)
    with (
        fetching("tcp://127.0.0.1:1", TOKEN) as fetch,
        pytest.raises(StageError, match=r"the head sends nothing of manifest\.json from tcp://127\.0\.0\.1:1: it does"),
    ):
        cache_of(tmp_path, artifact).fill(fetch, lambda _: (), verify=False)


def test_a_source_with_another_token(source: ArtifactSource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifact_cache, "_ANSWER_MS", 2000)
    with fetching(source.address, "x" * 20) as fetch, pytest.raises(StageError, match="refuses the token"):
        fetch("manifest.json", 0, 1)
