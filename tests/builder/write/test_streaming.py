"""Weights streamed into files: each source is read once, whatever fails is told, and threads change no byte."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest

from furiosa_llm.builder import ArtifactBuilder, ModelLoadError, OptionError, OutputError
from furiosa_llm.builder.lower.program_builder import ShardedTensor
from furiosa_llm.builder.plan.tactics import read_tactics
from furiosa_llm.builder.source import tensors as tensor_reading
from furiosa_llm.builder.source.protobuf_scan import LEFT_OUT_NBYTES
from furiosa_llm.builder.source.tensors import SourceTensor, read_packed
from furiosa_llm.builder.write import read_ahead
from furiosa_llm.builder.write.streaming import write_weights
from furiosa_llm.runtime.artifact.layout import Leaf, Mesh
from furiosa_llm.runtime.artifact.reader import open_artifact
from tests.support.artifacts import artifact_of
from tests.support.builder.graphs import model
from tests.support.tiers import tiered

MESH = Mesh((2, 2))
Seen = Callable[[npt.NDArray[np.uint8]], None]


def digests(folder: Path) -> dict[str, str]:
    """The digest of every file."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def tensors(*sizes: int) -> list[ShardedTensor]:
    """Stored tensors of so many rows of 256 floats, each cut into columns."""
    found = []
    for number, rows in enumerate(sizes):
        array = np.random.default_rng(number).standard_normal((rows, 256)).astype(np.float32)
        found.append(
            ShardedTensor(
                name=f"w{number}",
                dtype=ir.DataType.FLOAT,
                local_shape=(rows, 64),
                shard_axes=(0, 1),
                layout=(Leaf(rows), Leaf(256, (0, 1))),
                source=ir.Tensor(array),
            )
        )
    return found


@pytest.mark.parametrize(
    "name", tiered(["tiny-llama-optimum", "tiny-llama-genai-int4-qdq"], ["tiny-llama-genai-int4-qdq"])
)
def test_the_number_of_threads_changes_nothing(name: str, zoo: Path, tmp_path: Path) -> None:
    builder = ArtifactBuilder(zoo / name / "model.onnx")
    for workers in (1, 2, 5):
        builder.build(tmp_path / str(workers), workers=workers)
    assert digests(tmp_path / "1") == digests(tmp_path / "2") == digests(tmp_path / "5")


@pytest.mark.parametrize("workers", [0, -1, 6])
def test_a_number_of_threads_that_cannot_be(workers: int, zoo: Path, tmp_path: Path) -> None:
    builder = ArtifactBuilder(zoo / "tiny-llama-optimum" / "model.onnx")
    with pytest.raises(OptionError, match=f"workers must be 1 to 5, got {workers}"):
        builder.build(tmp_path / "artifact", workers=workers)
    assert list(tmp_path.iterdir()) == []


def test_digests_are_those_of_the_bytes(zoo: Path) -> None:
    path = zoo / "tiny-phi3-optimum" / "model.onnx"
    artifact = open_artifact(artifact_of("tiny-phi3-optimum"))
    for tensor in artifact.manifest.tensors:
        shards = artifact.manifest.mesh.parts(tensor.shard_axes)
        content = (artifact.folder / tensor.file).read_bytes()
        nbytes = artifact.window(tensor.name, 0).nbytes * shards
        window = content[artifact.offsets[tensor.name] : artifact.offsets[tensor.name] + nbytes]
        assert tensor.sha256 == hashlib.sha256(window).hexdigest()
    for entry in artifact.manifest.files:
        assert entry.sha256 == hashlib.sha256((artifact.folder / entry.path).read_bytes()).hexdigest()
    originals = {t.name: ir.from_proto(t).tobytes() for t in onnx.load(path).graph.initializer}
    for original in artifact.manifest.initializers:
        if original.stored:
            assert original.sha256 == hashlib.sha256(originals[original.name]).hexdigest()


def test_every_source_is_read_once(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that are read of the model's file after the plan is made: those of the stored originals, each once."""
    read: list[tuple[int, int]] = []
    path = zoo / "tiny-llama-optimum" / "model.onnx"
    real = os.preadv

    def counted(descriptor: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        found = real(descriptor, buffers, offset, flags)
        if os.path.samestat(os.fstat(descriptor), path.stat()):  # the artifact's own files are read, too
            read.append((offset, found))
        return found

    def told(stage: str, done: int, _: int) -> None:
        if (stage, done) == ("lower", 0):
            monkeypatch.setattr(os, "preadv", counted)

    monkeypatch.setattr(tensor_reading._DirectFile, "is_open", False)  # whole blocks would be counted
    ArtifactBuilder(path).build(tmp_path / "a", progress=told)
    stored = [entry for entry in open_artifact(tmp_path / "a").manifest.initializers if entry.stored]
    large = sum(n for n in (4 * math.prod(entry.shape) for entry in stored) if n > LEFT_OUT_NBYTES)
    assert sum(nbytes for _, nbytes in read) == large > 0.9 * path.stat().st_size - 100_000
    ends = sorted((offset, offset + nbytes) for offset, nbytes in read)
    assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(ends)), "a byte twice"


def test_a_source_in_two_layouts_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One product takes the weight's columns in parts, a softmax of it needs them whole."""
    nodes = "h = MatMul(x, w) r = Relu(h) y = MatMul(r, v) s = Softmax<axis = 1>(w) t = MatMul(x, s) z = ReduceMax(t)"
    proto = model("float[batch, 8] x", "float[batch, 8] y, float[one, two] z", nodes, {"w": (8, 64), "v": (64, 8)})
    onnx.save(proto, tmp_path / "model.onnx")
    (tmp_path / "tactics.toml").write_text('[[tactic]]\nweight = "w"\ndim = 1\nplace = 4')
    reads: Counter[str] = Counter()

    def counted(tensor: ir.TensorProtocol, seen: Seen) -> npt.NDArray[np.uint8]:
        reads[str(tensor.name)] += 1
        return read_packed(tensor, seen)

    monkeypatch.setattr(read_ahead, "read_packed", counted)
    ArtifactBuilder(tmp_path / "model.onnx", tactics=read_tactics(tmp_path / "tactics.toml")).build(tmp_path / "a")
    assert [t.origin for t in open_artifact(tmp_path / "a").manifest.tensors].count("w") == 2
    assert reads == {"w": 1, "v": 1}


@pytest.mark.parametrize("sizes", [(4, 4, 4), (4, 64, 4), (64, 64, 64)])
def test_no_more_is_in_memory_than_the_largest_tensor(
    sizes: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading ahead stops where it would take more than the largest takes alone."""
    monkeypatch.setattr(read_ahead, "LEAST_ROOM_NBYTES", 8 * 1024)
    alive: dict[int, int] = {}
    most: list[int] = []

    class Token:
        """Goes with the buffer that it is an attribute of."""

        def __init__(self, nbytes: int) -> None:
            alive[id(self)] = nbytes
            most.append(sum(alive.values()))

        def __del__(self) -> None:
            del alive[id(self)]

    class Buffer(np.ndarray):
        """An array that can have attributes."""

        token: Token

    def read(source: ir.TensorProtocol, seen: Seen) -> npt.NDArray[np.uint8]:
        found = np.frombuffer(source.tobytes(), dtype=np.uint8).copy().view(Buffer)
        found.token = Token(len(found))
        return found

    monkeypatch.setattr(read_ahead, "read_packed", read)
    write_weights(tmp_path, tensors(*sizes), MESH, lambda _: None, workers=5)
    assert len(most) == len(sizes)
    assert max(most) <= max(8 * 1024, 1024 * max(sizes))


def test_streamed_tensors_are_never_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows over the ranks are the source's bytes in their order: they pass by in pieces."""
    monkeypatch.setattr(tensor_reading, "STREAMED_NBYTES", 1000)
    monkeypatch.setattr(read_ahead, "STREAMED_NBYTES", 1000)
    array = np.random.default_rng(0).standard_normal((64, 300)).astype(np.float32)
    array.tofile(tmp_path / "data")
    shape = ir.Shape(array.shape)
    source = SourceTensor("data", 0, array.nbytes, ir.DataType.FLOAT, shape=shape, name="w", base_dir=tmp_path)
    tensor = ShardedTensor(
        name="w",
        dtype=ir.DataType.FLOAT,
        local_shape=(16, 300),
        shard_axes=(0, 1),
        layout=(Leaf(64, (0, 1)), Leaf(300)),
        source=source,
    )

    def refuse(*_: object) -> npt.NDArray[np.uint8]:
        raise AssertionError("read whole")

    monkeypatch.setattr(read_ahead, "read_packed", refuse)
    for workers in (1, 5):
        written = write_weights(tmp_path, [tensor], MESH, lambda _: None, workers=workers)
        place, digest = written.placements["w"], hashlib.sha256(array.tobytes()).hexdigest()
        content = (tmp_path / place.file).read_bytes()
        assert content[place.offset :] == array.tobytes()
        assert (place.sha256, written.source_digests[id(source)]) == (digest, digest)
        assert written.files[0].sha256 == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("workers", [1, 5])
def test_an_error_while_reading_ahead_is_told(workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = tensors(4, 4, 4)

    def read(source: ir.TensorProtocol, seen: Seen) -> npt.NDArray[np.uint8]:
        if source is stored[1].source:
            raise ValueError("unreadable")
        return read_packed(source, seen)

    monkeypatch.setattr(read_ahead, "read_packed", read)
    with pytest.raises(ValueError, match="unreadable"):
        write_weights(tmp_path, stored, MESH, lambda _: None, workers=workers)


@pytest.mark.parametrize("workers", [1, 5])
def test_a_disk_that_fails_ends_the_reading(workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No thread is left waiting for room."""
    monkeypatch.setattr(read_ahead, "LEAST_ROOM_NBYTES", 0)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = set(threading.enumerate())
    with pytest.raises(OSError, match="No space left"):
        write_weights(tmp_path, tensors(64, 64, 64, 64), MESH, full, workers=workers)
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("change", ["appended", "rewritten", "removed", "cut short"])
def test_a_source_that_changes_while_it_is_read(change: str, zoo: Path, tmp_path: Path) -> None:
    shutil.copytree(zoo / "tiny-llama-optimum", tmp_path / "m")
    path = tmp_path / "m" / "model.onnx"
    content = path.read_bytes()

    def told(stage: str, done: int, total: int) -> None:
        if stage != "write" or done < total / 2 or (tmp_path / "changed").exists():
            return
        (tmp_path / "changed").touch()
        if change == "removed":
            path.unlink()
        else:
            ends = {"appended": content + b"x", "rewritten": content, "cut short": content[: len(content) // 2]}
            path.write_bytes(ends[change])

    with pytest.raises(ModelLoadError, match=r"model\.onnx.*(changed while|is missing)"):
        ArtifactBuilder(path).build(tmp_path / "a", progress=told, workers=1)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["changed", "m"]


LIMITED = """
import resource, signal, sys
from furiosa_llm.builder import ArtifactBuilder, OutputError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), int(sys.argv[3])))
try:
    ArtifactBuilder(sys.argv[1]).build(sys.argv[2])
except OutputError as error:
    print(error)
"""


@pytest.mark.parametrize("limit", tiered([1000, 300_000], [300_000]))
def test_a_file_that_cannot_grow(limit: int, zoo: Path, tmp_path: Path) -> None:
    """The operating system refuses a write midway, as it does where a disk is full."""
    command = [sys.executable, "-c", LIMITED, str(zoo / "tiny-llama-optimum" / "model.onnx"), str(tmp_path / "a")]
    done = subprocess.run([*command, str(limit)], check=True, capture_output=True, text=True)
    assert "failed: File too large; nothing was left behind. Check the free space" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_more_than_the_disk_has(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before anything is written."""
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(OutputError, match=r"the artifact's weights take .* has 1\.0 kB left; free some space"):
        ArtifactBuilder(zoo / "tiny-llama-optimum" / "model.onnx").build(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_headers_are_aligned(tmp_path: Path) -> None:
    """Data begins at a multiple of 64 bytes, and the header is JSON padded with spaces."""
    write_weights(tmp_path, tensors(4, 8), MESH, lambda _: None, workers=1)
    content = (tmp_path / "weights-00001.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert (8 + length) % 64 == 0
    header = json.loads(content[8 : 8 + length])
    assert header["w1"] == {"dtype": "F32", "shape": [4, 8, 64], "data_offsets": [4096, 12288]}
