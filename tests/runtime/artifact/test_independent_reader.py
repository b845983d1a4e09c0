"""The two readers of artifacts agree, and so do the specification's example and both of them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import onnx
import pytest

from furiosa_llm.builder import ArtifactBuilder, read_tactics
from furiosa_llm.runtime.artifact.layout import Cat, Dim, Leaf, Mesh, Prefix, Prod
from furiosa_llm.runtime.artifact.manifest import Part
from furiosa_llm.runtime.artifact.reader import Artifact, open_artifact
from furiosa_llm.runtime.artifact.tools.originals import read_original, read_whole
from furiosa_llm.runtime.artifact.tools.unbuild import unbuild
from tests.conftest import Built
from tests.support import independent_reader
from tests.support.builder.graphs import model
from tests.support.independent_reader import IndependentReader
from tests.support.runtime.shards import Original, Shards, shape_of, write

ROOT = Path(__file__).parents[3]
MODELS = [
    ("tiny-llama-9-3-optimum", 8),  # 9 heads and 3 key heads
    ("tiny-phi3-optimum", 8),  # packed query, key and value in parts
    ("tiny-gptoss-genai-fp32-fullkv", 4),  # experts, and parts of biases
    ("tiny-llama-genai-int4", 4),  # packed bytes, prefixes of blocks
    ("tiny-llama-genai-int4-qdq", 8),  # elements below a byte
]


def check_equal(artifact: Artifact) -> None:
    """Every window of every rank, and every original."""
    reader = IndependentReader(artifact.folder)
    assert reader.tensors.keys() == artifact.tensors.keys()
    assert len(reader.ranks()) == artifact.manifest.mesh.size
    assert reader.program == artifact.program
    for name in artifact.tensors:
        for rank in reader.ranks():
            assert reader.window(name, rank) == artifact.read_window(artifact.window(name, rank)).tobytes()
    stored = [entry.name for entry in artifact.manifest.initializers if entry.stored]
    assert stored
    for name in stored:
        assert reader.original(name) == read_original(artifact, name).tobytes()


@pytest.mark.parametrize(("name", "tp"), MODELS)
def test_models_of_the_zoo(name: str, tp: int, built: Built) -> None:
    check_equal(built(name, tp)[1])


@pytest.mark.parametrize("dtype", ["DOUBLE", "BFLOAT16", "BOOL", "UINT4", "INT2"])
def test_layouts_that_no_exporter_needs(dtype: str, tmp_path: Path) -> None:
    layouts: dict[str, tuple[Dim, ...]] = {
        "cat": (Cat((Prod((Leaf(3, (1, 0)), Leaf(3))), Leaf(5, (0, 1)))), Leaf(3)),
        "prefix": (Leaf(3), Prefix(11, Prod((Leaf(3, (0, 1)), Leaf(4))))),
        "both": (Prod((Leaf(3), Leaf(5, (0,)))), Leaf(3, (1,))),
        "scalar": (),
    }
    shards = {name: Shards(name, layout) for name, layout in layouts.items()}
    originals = [Original.random(name, dtype, shape_of(layout)) for name, layout in layouts.items()]
    for name, start, stop in (("one", 0, 3), ("two", 3, 8)):
        shards[name] = Shards("parts", (Leaf(3), Leaf(stop - start, (1,))), Part(dim=1, start=start, stop=stop))
    originals.append(Original.random("parts", dtype, (3, 8), stored=["one", "two"]))
    check_equal(write(tmp_path / "a", Mesh((2, 2)), originals, shards))


def test_a_second_layout(tmp_path: Path) -> None:
    """One product takes columns in parts, a softmax needs them whole: both layouts are of the same original."""
    nodes = "h = MatMul(x, w) r = Relu(h) y = MatMul(r, v) s = Softmax<axis = 1>(w) t = MatMul(x, s) z = ReduceMax(t)"
    proto = model("float[batch, 8] x", "float[batch, 8] y, float[one, two] z", nodes, {"w": (8, 64), "v": (64, 8)})
    onnx.save(proto, tmp_path / "model.onnx")
    (tmp_path / "tactics.toml").write_text('[[tactic]]\nweight = "w"\ndim = 1\nplace = 4')
    tactics = read_tactics(tmp_path / "tactics.toml")
    ArtifactBuilder(tmp_path / "model.onnx", tactics=tactics).build(tmp_path / "artifact")
    artifact = open_artifact(tmp_path / "artifact", full=True)
    check_equal(artifact)
    reader = IndependentReader(artifact.folder)
    one, other = (name for name, tensor in artifact.tensors.items() if tensor.origin == "w")
    expected = onnx.numpy_helper.to_array(next(i for i in proto.graph.initializer if i.name == "w")).tobytes()
    for name in (one, other):
        assert read_whole(artifact, [name]).tobytes() == reader.whole_tensor([name], [8, 64]) == expected


# -- the specification -----------------------------------------------------------------------------------------------


@pytest.fixture
def example(tmp_path: Path) -> Path:
    """The artifact that docs/artifact-format.md spells out, byte for byte."""
    text = (ROOT / "docs" / "artifact-format.md").read_text()
    blocks = re.findall(
        r"^([\w.-]+) \((\d+) bytes\)[^`]*?(?:`[^`\n]*`[^`]*?)*```(json|hex)\n(.*?)```", text, re.M | re.S
    )
    assert [name for name, *_ in blocks] == [
        "manifest.json",
        "weights-00001.safetensors",
        "program.onnx",
        "source.onnx",
    ]
    folder = tmp_path / "example"
    folder.mkdir()
    for name, nbytes, kind, content in blocks:
        data = content.encode() if kind == "json" else bytes.fromhex(content)
        assert len(data) == int(nbytes), name
        (folder / name).write_bytes(data)
    return folder


def test_the_example_is_an_artifact(example: Path, tmp_path: Path) -> None:
    artifact = open_artifact(example, full=True)
    check_equal(artifact)
    assert read_original(artifact, "w").tobytes() == bytes(range(1, 19))
    assert artifact.read_window(artifact.window("w", 3)).tobytes().hex(" ") == "0f 00 12 00 00 00 00 00"
    found = onnx.load(unbuild(artifact, tmp_path / "m.onnx").model)
    assert onnx.numpy_helper.to_array(found.graph.initializer[0]).tolist()[5] == [16, 17, 18]
    onnx.checker.check_model(found)


@pytest.mark.parametrize("name", ["manifest.json", "weights-00001.safetensors", "program.onnx", "source.onnx"])
def test_every_byte_of_the_example_counts(name: str, example: Path) -> None:
    """To the second reader too: no byte can be changed without its noticing."""
    data = (example / name).read_bytes()
    for position in range(len(data)):
        (example / name).write_bytes(data[:position] + bytes([data[position] ^ 0x20]) + data[position + 1 :])
        with pytest.raises((ValueError, KeyError)):
            IndependentReader(example)
    (example / name).write_bytes(data)
    IndependentReader(example)


def test_the_second_reader_shares_nothing_with_the_first() -> None:
    tree = ast.parse(Path(independent_reader.__file__).read_text())
    imports = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    libraries = {"numpy", "numpy.typing", "onnx"}
    assert imports | modules == libraries | {"__future__", "hashlib", "json", "math", "pathlib", "typing"}
