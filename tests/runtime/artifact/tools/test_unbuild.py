"""`unbuild`: every model of the zoo comes back, bit for bit, and gives the same results, bit for bit."""

from __future__ import annotations

import hashlib
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from furiosa_llm.builder import ArtifactBuilder
from furiosa_llm.example.smollm2 import SHAPES
from furiosa_llm.example.smollm2.recipe import ensure
from furiosa_llm.runtime.artifact.errors import ArtifactError, OutputFileError
from furiosa_llm.runtime.artifact.layout import Leaf, Mesh
from furiosa_llm.runtime.artifact.progress import telling
from furiosa_llm.runtime.artifact.reader import Artifact, open_artifact
from furiosa_llm.runtime.artifact.tools.unbuild import unbuild
from tests.builder.test_zoo import MODELS, Row
from tests.conftest import Built
from tests.support.artifacts import smollm2_artifact
from tests.support.builder.graphs import model, random
from tests.support.builder.parity import cases_of, feeds_of
from tests.support.runtime.shards import Original, Shards, source_of, write
from tests.support.tiers import tiered

FAST = {
    ("tiny-qwen2-14-2-optimum", 8),
    ("tiny-phi3-optimum", 8),
    ("tiny-llama-genai-int4", 4),
    ("tiny-t5-optimum/decoder_model.onnx", 4),
    ("tiny-llama-genai-fp16-cuda", 4),
    ("tiny-llama-tied-genai-int4-shared", 4),
}
"""Padded key heads, packed weights in parts, prefixes of blocks, small external ones; the others are slow."""

ROWS = [
    pytest.param(
        row, tp, marks=() if (row.path, tp) in FAST else pytest.mark.slow, id=f"{row.path.replace('/', '-')}-{tp}"
    )
    for row in MODELS
    for tp in (4, 8)
]


@pytest.mark.parametrize(("row", "tp"), ROWS)
def test_every_model_of_the_zoo_comes_back(row: Row, tp: int, built: Built, zoo: Path, tmp_path: Path) -> None:
    _, artifact = built(row.path, tp)
    written = unbuild(artifact, tmp_path / "model.onnx")
    assert written.num_rebuilt > 0
    assert {path.name for path in tmp_path.iterdir()} == {"model.onnx", "model.onnx.data"}
    check_initializers(row.file(zoo), written.model)
    original, found = onnx.load(row.file(zoo)), onnx.load(written.model)
    for value in (*original.graph.input, *original.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param.isdecimal():  # a size that was written as a symbol comes back as the size
                dim.dim_value = int(dim.dim_param)
    del original.graph.initializer[:], found.graph.initializer[:]
    assert original == found
    check_results(artifact, row.file(zoo), written.model)


def check_initializers(original: Path, found: Path) -> None:
    """All are there, in the same order, of the same type and shape, with the same bytes."""
    expected, initializers = (ir.load(path).graph.initializers for path in (original, found))
    assert list(expected) == list(initializers)
    for name, value in expected.items():
        ours, theirs = initializers[name].const_value, value.const_value
        assert ours is not None
        assert theirs is not None
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), name
        assert ours.tobytes() == theirs.tobytes(), name


def check_results(artifact: Artifact, original: Path, found: Path) -> None:
    """Both files as they lie on the disk, run by onnxruntime at every case, give the same bits."""
    manifest = artifact.manifest
    theirs, ours = session(original), session(found)
    wanted = {value.name for value in theirs.get_inputs()}
    for case in cases_of(artifact.program):
        feeds = feeds_of(manifest.inputs, case, manifest.model.vocab_size)
        given = {name: array for name, array in feeds.items() if name in wanted}
        for expected, result in zip(theirs.run(None, given), ours.run(None, given), strict=True):
            assert np.isfinite(expected).any()
            assert expected.tobytes() == result.tobytes(), case.name


def session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


REAL = {(shape, tp) for shape in SHAPES for tp in (4, 8)}


@pytest.mark.real_model
@pytest.mark.parametrize(("shape", "tp"), tiered(sorted(REAL), (), REAL - {("int4", 8), ("optimum-fp32", 4)}))
def test_a_real_model_comes_back(shape: str, tp: int, tmp_path: Path) -> None:
    original = ensure(shape) / "model.onnx"
    written = unbuild(open_artifact(smollm2_artifact(shape, tp)), tmp_path / "model.onnx")
    expected, found = (
        {
            name: hashlib.sha256(value.const_value.tobytes()).hexdigest()
            for name, value in ir.load(path).graph.initializers.items()
            if value.const_value is not None
        }
        for path in (original, written.model)
    )
    assert expected == found
    assert len(expected) == written.num_initializers


# -- what is in the files --------------------------------------------------------------------------------------------

TWO_NAMES = "x = Gather(e, input_ids) a = MatMul(x, w) b = Identity(w) c = MatMul(a, b) y = Identity(c)"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A decoder-like chain with one matrix under one name and one that is not used."""
    folder = tmp_path_factory.mktemp("small")
    weights = {"unused": random(40, 40), "e": random(64, 32), "w": random(32, 32)}
    proto = model("int64[batch, sequence] input_ids", "float[batch, sequence, 32] y", TWO_NAMES, weights)
    onnx.save(proto, folder / "model.onnx")
    ArtifactBuilder(folder / "model.onnx").build(folder / "artifact")
    return open_artifact(folder / "artifact", full=True)


def test_large_initializers_are_external_and_aligned(small: Artifact, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    with telling(lambda *step: told.append(step)):
        written = unbuild(small, tmp_path / "m.onnx")
    proto = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    places = [{item.key: item.value for item in i.external_data} for i in proto.graph.initializer]
    assert [place["location"] for place in places] == ["m.onnx.data"] * 3
    assert [int(place["offset"]) % 4096 for place in places] == [0] * 3
    lengths = [int(place["length"]) for place in places]
    assert lengths == [40 * 40 * 4, 64 * 32 * 4, 32 * 32 * 4]
    assert (written.num_initializers, written.num_rebuilt, written.nbytes) == (3, 3, sum(lengths))
    assert told == [("write", sum(lengths[: i + 1]), sum(lengths)) for i in range(3)]


def test_a_model_without_stored_weights_has_no_data_file(tmp_path: Path) -> None:
    proto = model("float[batch, 4] x", "float[batch, 4] y", "y = Add(x, b)", {"b": random(4)})
    onnx.save(proto, tmp_path / "model.onnx")
    ArtifactBuilder(tmp_path / "model.onnx").build(tmp_path / "artifact")
    (tmp_path / "m.onnx").write_bytes(b"old")
    (tmp_path / "m.onnx.data").write_bytes(b"old")
    written = unbuild(open_artifact(tmp_path / "artifact"), tmp_path / "m.onnx", force=True)
    assert written.data is None
    assert not (tmp_path / "m.onnx.data").exists()
    assert onnx.load(tmp_path / "m.onnx") == proto


# -- artifacts that are not what they say ----------------------------------------------------------------------------


def source(*initializers: onnx.TensorProto) -> bytes:
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "g", values[:1], values[1:])
    graph.initializer.extend(initializers)
    return bytes(onnx.helper.make_model(graph).SerializeToString())


def external(name: str = "w", shape: tuple[int, ...] = (6, 4)) -> onnx.TensorProto:
    proto = onnx.TensorProto(name=name, data_type=onnx.TensorProto.FLOAT, dims=shape)
    proto.data_location = onnx.TensorProto.EXTERNAL
    proto.external_data.add(key="location", value="artifact")
    return proto


def artifact_of(folder: Path, *initializers: onnx.TensorProto) -> Artifact:
    original = Original.random("w", "FLOAT", (6, 4))
    return write(folder, Mesh((2,)), [original], {"w": Shards("w", (Leaf(6, (0,)), Leaf(4)))}, source(*initializers))


def test_the_smallest_artifact_comes_back(tmp_path: Path) -> None:
    """So that the refusals below are of what they change."""
    written = unbuild(artifact_of(tmp_path / "a", external()), tmp_path / "m.onnx")
    array = onnx.numpy_helper.to_array(onnx.load(written.model).graph.initializer[0])
    assert array.tobytes() == Original.random("w", "FLOAT", (6, 4)).packed


def test_a_source_that_was_exchanged_since(small: Artifact, tmp_path: Path) -> None:
    """What is unbuilt is what was opened."""
    folder = tmp_path / "artifact"
    shutil.copytree(small.folder, folder)
    opened = open_artifact(folder)
    (folder / "source.onnx").write_bytes(source_of([Original.random("w", "FLOAT", (3, 3))]))
    with pytest.raises(ArtifactError, match=r"source\.onnx: found \d+ bytes, expected \d+; it is being written to"):
        unbuild(opened, tmp_path / "m.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]


def test_aliases_share_one_region(tmp_path: Path) -> None:
    """Two initializers that name the same stored tensor."""
    originals = [Original.random("w", "FLOAT", (6, 4)), Original.random("v", "FLOAT", (6, 4), stored=["w"])]
    shards = {"w": Shards("w", (Leaf(6, (0,)), Leaf(4)))}
    proto = source(external(), external("v"))
    written = unbuild(write(tmp_path / "a", Mesh((2,)), originals, shards, proto), tmp_path / "m.onnx")
    one, other = onnx.load(written.model, load_external_data=False).graph.initializer
    assert one.external_data == other.external_data
    assert written.nbytes == (tmp_path / "m.onnx.data").stat().st_size == 6 * 4 * 4
    assert (written.num_rebuilt, written.num_initializers) == (2, 2)
    assert {onnx.numpy_helper.to_array(i).tobytes() for i in onnx.load(written.model).graph.initializer} == {
        originals[0].packed
    }


def test_one_wrong_bit_is_named(small: Artifact, tmp_path: Path) -> None:
    """The files' sizes are right, and an artifact that is not opened in full is opened."""
    folder = tmp_path / "artifact"
    folder.mkdir()
    for path in small.folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights = folder / "weights-00001.safetensors"
    data = bytearray(weights.read_bytes())
    window = small.window("w", 3)
    data[window.offset + window.nbytes - 1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ArtifactError, match="initializer 'w' is not what it was: its shards make up sha256"):
        unbuild(open_artifact(folder, full=False), tmp_path / "m.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]


def test_empty_initializers_are_inline(tmp_path: Path) -> None:
    """To some readers a length of 0 in external data is the rest of the file."""
    originals = [Original.random("w", "FLOAT", (6, 4)), Original.random("none", "FLOAT", (0, 4))]
    shards = {"w": Shards("w", (Leaf(6, (0,)), Leaf(4))), "none": Shards("none", (Leaf(0), Leaf(4)))}
    proto = source(external("none", (0, 4)), external())
    artifact = write(tmp_path / "a", Mesh((2,)), originals, shards, proto)
    written = unbuild(artifact, tmp_path / "m.onnx")
    none, w = onnx.load(written.model).graph.initializer
    assert onnx.numpy_helper.to_array(none).shape == (0, 4)
    assert onnx.numpy_helper.to_array(w).tobytes() == originals[0].packed


# -- outputs that cannot be written ----------------------------------------------------------------------------------


def test_nothing_is_replaced_without_force(small: Artifact, tmp_path: Path) -> None:
    for name in ("m.onnx", "m.onnx.data"):
        (tmp_path / name).write_bytes(b"precious")
        with pytest.raises(OutputFileError, match=rf"{name} exists already; give another output, or --force"):
            unbuild(small, tmp_path / "m.onnx")
        assert (tmp_path / name).read_bytes() == b"precious"
        unbuild(small, tmp_path / "m.onnx", force=True)
        assert onnx.load(tmp_path / "m.onnx").graph.node
        for path in tmp_path.iterdir():
            path.unlink()


def test_names_that_cannot_be_outputs(small: Artifact, tmp_path: Path) -> None:
    (tmp_path / "m.onnx.data").mkdir()
    (tmp_path / "file").write_bytes(b"")
    refused = {
        tmp_path: "is a folder; give the name of an .onnx file",
        Path("/"): "is a folder; give the name of an .onnx file",
        tmp_path / "m.onnx": "is a folder, where the weights go",
        small.folder / "source.onnx": "lies in the artifact itself",
        tmp_path / "file" / "m.onnx": "cannot write to .*file: ",
    }
    for path, message in refused.items():
        with pytest.raises(OutputFileError, match=message):
            unbuild(small, path, force=True)


@pytest.fixture
def full_disk() -> Iterator[None]:
    """No file may grow beyond 10 kB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_leaves_what_was_there(small: Artifact, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"old")
    with pytest.raises(OutputFileError, match=r"writing .*m\.onnx failed: .*nothing was left behind"):
        unbuild(small, tmp_path / "m.onnx", force=True)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("m.onnx", b"old")]


def test_a_model_never_has_another_s_weights(small: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped between the two renames, the old model is gone and the new one is not there."""
    for name in ("m.onnx", "m.onnx.data"):
        (tmp_path / name).write_bytes(b"old")
    replace = Path.replace

    def stopped(self: Path, target: Path) -> Path:
        if target.name == "m.onnx":
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        unbuild(small, tmp_path / "m.onnx", force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx.data"]
