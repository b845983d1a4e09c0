"""Another tensor parallel size from an artifact alone: the same bytes as a fresh build."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from furiosa_llm.builder import ArtifactBuilder, OptionError, read_tactics, reshard
from furiosa_llm.example.smollm2 import SHAPES
from furiosa_llm.runtime.artifact.errors import ArtifactError
from furiosa_llm.runtime.artifact.manifest import seal
from furiosa_llm.runtime.artifact.reader import open_artifact
from tests.builder.test_zoo import MODELS
from tests.builder.write.test_streaming import digests
from tests.conftest import Built
from tests.support.artifacts import artifact_of, smollm2_artifact
from tests.support.builder.graphs import model, random
from tests.support.tiers import tiered

FEW = (("tiny-phi3-optimum", 8, 4), ("tiny-llama-genai-int4-qdq", 8, 4))
"""A packed weight in parts, and elements below one byte."""
LEFT = {(row.path, *((4, 8), (8, 4))[number % 2]) for number, row in enumerate(MODELS)} - set(FEW)
"""To `make test-release`: each model goes one way in every run."""


@pytest.mark.parametrize(
    ("name", "before", "after"), tiered([(row.path, *way) for row in MODELS for way in ((4, 8), (8, 4))], FEW, LEFT)
)
def test_the_bytes_are_those_of_a_fresh_build(name: str, before: int, after: int, built: Built, tmp_path: Path) -> None:
    _, start = built(name, before)
    _, expected = built(name, after)
    report = reshard(start.folder, tmp_path / "artifact", tensor_parallel_size=after)
    assert digests(tmp_path / "artifact") == digests(expected.folder)
    assert (report.tensor_parallel_size, report.faults) == (after, built(name, after)[0].faults)


@pytest.mark.slow
def test_options_and_names_are_kept(zoo: Path, tmp_path: Path) -> None:
    """Everything that the first build was told, the second is told, too."""
    text = '[[tactic]]\nrole = "feed-forward"\nlayers = [-1]\nplace = "replicate"'
    (tmp_path / "tactics.toml").write_text(text)
    path = zoo / "tiny-llama-optimum" / "model.onnx"
    for size in (4, 8):
        builder = ArtifactBuilder(
            path,
            "a name",
            tensor_parallel_size=size,
            max_seq_len_to_capture=100,
            max_padding=1.2,
            tactics=read_tactics(tmp_path / "tactics.toml"),
            fuse_attention=False,
        )
        builder.build(tmp_path / str(size))
    reshard(tmp_path / "4", tmp_path / "again", tensor_parallel_size=8)
    assert digests(tmp_path / "again") == digests(tmp_path / "8")
    manifest = open_artifact(tmp_path / "again").manifest
    assert (manifest.model.name, manifest.model.max_sequence_length) == ("a name", 100)


def test_how_the_source_holds_its_tensors_does_not_matter(tmp_path: Path) -> None:
    """Small and large ones, inline as raw or typed data, or external: the artifact knows no difference afterwards."""
    nodes = "x = Gather(e, input_ids) a = MatMul(x, w) b = Add(a, bias) s = Mul(b, scale) y = MatMul(s, v)"
    weights = {"e": random(64, 32), "w": random(32, 32), "v": random(32, 64), "bias": random(32)}
    proto = model("int64[batch, sequence] input_ids", "float[batch, sequence, 64] y", nodes, weights)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array([0.5], np.float32), "scale"))
    inline, typed, external = tmp_path / "inline", tmp_path / "typed", tmp_path / "external"
    for folder in (inline, typed, external):
        folder.mkdir()
    onnx.save(proto, inline / "m.onnx")
    own = onnx.ModelProto()
    own.CopyFrom(proto)
    onnx.save_model(own, external / "m.onnx", save_as_external_data=True, size_threshold=0, location="data")
    for tensor in proto.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        tensor.ClearField("raw_data")
        tensor.float_data.extend(array.reshape(-1).tolist())
    onnx.save(proto, typed / "m.onnx")
    artifacts = {}
    for folder in (inline, typed, external):
        ArtifactBuilder(folder / "m.onnx").build(folder / "4")
        ArtifactBuilder(folder / "m.onnx", tensor_parallel_size=8).build(folder / "8")
        reshard(folder / "4", folder / "4to8", tensor_parallel_size=8)
        assert digests(folder / "4to8") == digests(folder / "8")
        artifacts[folder] = {n: d for n, d in digests(folder / "8").items() if n != "manifest.json"}
    assert artifacts[inline] == artifacts[typed] == artifacts[external]


def test_a_damaged_artifact_is_not_carried_on(tmp_path: Path) -> None:
    shutil.copytree(artifact_of("tiny-llama-optimum"), tmp_path / "a")
    weights = tmp_path / "a" / "weights-00001.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"is damaged: .*sha256 \w+\.\.\., expected \w+\.\.\.; copy the artifact"):
        reshard(tmp_path / "a", tmp_path / "b", tensor_parallel_size=8)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_size_that_is_not_supported(tmp_path: Path) -> None:
    shutil.copytree(artifact_of("tiny-llama-optimum"), tmp_path / "a")
    with pytest.raises(OptionError, match="5"):
        reshard(tmp_path / "a", tmp_path / "b", tensor_parallel_size=5)
    with pytest.raises(OptionError, match="16"):
        reshard(tmp_path / "a", tmp_path / "b", tensor_parallel_size=16)


def test_a_file_that_the_manifest_does_not_know(tmp_path: Path) -> None:
    """A configuration that somebody put there would steer the build."""
    shutil.copytree(artifact_of("tiny-llama-9-3-optimum"), tmp_path / "a")
    listed = {entry.path for entry in open_artifact(tmp_path / "a").manifest.files}
    assert "vocab.txt" not in listed
    (tmp_path / "a" / "vocab.txt").write_text("x")
    with pytest.raises(ArtifactError, match=r"has vocab\.txt, which its manifest does not list; remove it"):
        reshard(tmp_path / "a", tmp_path / "b", tensor_parallel_size=8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_padding": "much"}, r"options\.max_padding: found \"much\", expected a number of at least 1"),
        ({"max_padding": 0.5}, r"options\.max_padding: found 0\.5"),
        ({"max_padding": True}, r"options\.max_padding: found true"),
        ({"dims": {"n": 0}}, r"options\.dims: found an object, expected integers of at least 1, by name"),
        ({"dims": []}, r"options\.dims: found a list, expected integers of at least 1, by name"),
        ({"fuse_attention": 1}, r"options\.fuse_attention: found 1, expected True or False"),
        ({"tactics": [{}]}, r"options\.tactics\[0\]: found an object without it, expected the key 'selector'"),
        ({"max_seq_len_to_capture": -1}, r"max_seq_len_to_capture: found -1"),
        ({"tensor_parallel_size": 3}, r"options\.tensor_parallel_size: .*3"),
        ({"surprise": 1}, r"\$\.provenance\.options: found the unknown key 'surprise'"),
        (None, r"\$\.provenance\.options: found an object without it, expected the key 'tensor_parallel_size'"),
    ],
)
def test_options_that_no_build_recorded(
    change: dict[str, object] | None, message: str, built: Built, tmp_path: Path
) -> None:
    _, start = built("tiny-llama-optimum", 4)
    shutil.copytree(start.folder, tmp_path / "a")
    document = json.loads((tmp_path / "a" / "manifest.json").read_bytes())
    options = document["provenance"]["options"]
    document["provenance"]["options"] = {} if change is None else options | change
    (tmp_path / "a" / "manifest.json").write_bytes(seal(document))
    with pytest.raises(ArtifactError, match=message):
        reshard(tmp_path / "a", tmp_path / "b", tensor_parallel_size=8)


REAL = {(shape, *way) for shape in SHAPES for way in ((4, 8), (8, 4))}


@pytest.mark.real_model
@pytest.mark.parametrize(("shape", "before", "after"), tiered(sorted(REAL), (), REAL - {("optimum-fp32", 8, 4)}))
def test_the_real_model(shape: str, before: int, after: int, tmp_path: Path) -> None:
    reshard(smollm2_artifact(shape, before), tmp_path / "resharded", tensor_parallel_size=after)
    assert digests(tmp_path / "resharded") == digests(smollm2_artifact(shape, after))
