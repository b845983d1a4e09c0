"""Graphs without weights, filled: the bytes are where the graph says, finite, and no two tensors' alike."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, numpy_helper

from fixtures import filled, large
from fixtures.errors import SpaceError
from fixtures.filled import external_ranges, fill
from fixtures.outline import NormsAlone, write_outline
from furiosa_llm.example.errors import ModelFileError
from furiosa_llm.example.llama.config import LlamaConfig
from furiosa_llm.example.llama.weights import EMBEDDING

CONFIG = LlamaConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=32,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    tie_word_embeddings=False,
)


@pytest.mark.parametrize(
    ("int4", "tied"), [(False, False), (False, True), (True, True)], ids=["fp32", "fp32 tied", "int4"]
)
def test_a_filled_outline_runs(int4: bool, tied: bool, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, tie_word_embeddings=tied)
    model = write_outline(tmp_path, config, int4=int4)
    nbytes = fill(model)
    tensors = [numpy_helper.to_array(t) for t in onnx.load(model).graph.initializer]
    assert sum(array.nbytes for array in tensors) == nbytes
    assert len({array.tobytes() for array in tensors}) == len(tensors)
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    feeds = {"input_ids": np.array([[3, 7]]), "attention_mask": np.ones((1, 2), dtype=np.int64)}
    for value in session.get_inputs()[2:]:
        feeds[value.name] = np.zeros((1, config.num_key_value_heads, 0, config.head_dim), dtype=np.float32)
    logits = session.run(["logits"], feeds)[0]
    assert logits.shape == (1, 2, config.vocab_size)
    assert np.isfinite(logits).all()
    assert np.ptp(logits) > 0


def test_an_outline_has_the_nodes_of_the_exporter(zoo: Path, tmp_path: Path) -> None:
    """genai's own files: the same operators as often, on weights of the same names."""
    for name, int4, tied in (
        ("tiny-llama-genai-fp32", False, False),
        ("tiny-llama-tied-genai-int4-shared", True, True),
    ):
        expected = onnx.load(zoo / name / "model.onnx", load_external_data=False).graph
        model = write_outline(tmp_path, dataclasses.replace(CONFIG, tie_word_embeddings=tied), int4=int4)
        found = onnx.load(model, load_external_data=False).graph
        assert sorted(n.op_type for n in found.node) == sorted(n.op_type for n in expected.node)
        assert sorted(t.name for t in found.initializer) == sorted(t.name for t in expected.initializer)


def test_bytes_lie_where_an_exported_graph_has_them(graphs: Path, tmp_path: Path) -> None:
    """Each tensor cut to three elements, 64 bytes from one to the next."""
    proto = onnx.load(graphs / "llama-3.1-8b-dynamo-op21-fp16" / "model.onnx", load_external_data=False)
    weights = [t for t in proto.graph.initializer if t.data_location == TensorProto.EXTERNAL]
    offset = 0
    for tensor in weights:
        tensor.dims[0] = 3
        del tensor.dims[1:]
        entries = {entry.key: entry for entry in tensor.external_data}
        entries["offset"].value, entries["length"].value = str(offset), "6"
        offset += 64
    onnx.save(proto, tmp_path / "model.onnx")
    assert fill(tmp_path / "model.onnx") == 6 * len(weights)
    data = (tmp_path / "weights.bin").read_bytes()
    values = np.frombuffer(data.ljust(offset, b"\0"), dtype=np.float16).reshape(len(weights), 32)
    assert np.isfinite(values).all()
    assert (values[:, :3] != 0).all()
    assert (values[:, 3:] == 0).all()


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    model = write_outline(tmp_path, CONFIG)
    found = []
    for seed in (0, 0, 1):
        fill(model, seed=seed)
        found.append((tmp_path / "model.onnx.data").read_bytes())
    assert found[0] == found[1] != found[2]


def test_chunks_of_one_tensor_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filled, "_CHUNK_NBYTES", 4096)
    model = write_outline(tmp_path, CONFIG)
    fill(model)
    embedding = next(r for r in external_ranges(model) if r.name == EMBEDDING)
    data = (tmp_path / embedding.location).read_bytes()[embedding.offset : embedding.offset + embedding.nbytes]
    chunks = {data[start : start + 4096] for start in range(0, len(data), 4096)}
    assert len(chunks) == 16


def test_a_disk_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_outline(tmp_path, CONFIG)
    usage = shutil.disk_usage(tmp_path)._replace(free=10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(SpaceError, match=r"has 1\.0 GB of free space, expected 1\.1 GB; free space, choose another"):
        fill(model)


def test_a_type_without_numbers(tmp_path: Path) -> None:
    model = write_outline(tmp_path, CONFIG)
    proto = onnx.load(model, load_external_data=False)
    proto.graph.initializer[0].data_type = TensorProto.INT64
    onnx.save(proto, model)
    with pytest.raises(ModelFileError, match="is of type INT64, which no bytes are drawn for"):
        fill(model)


def test_an_outline_has_no_numbers_but_norms() -> None:
    with pytest.raises(ValueError, match=r"lm_head.weight is not a norm"):
        NormsAlone(CONFIG).tensor("lm_head.weight")


@pytest.mark.parametrize(("kind", "gigabytes"), [key for key in large.MODELS if key[0] != "exported"])
def test_large_models_are_as_large_as_they_say(kind: str, gigabytes: int, tmp_path: Path) -> None:
    config = large.MODELS[kind, gigabytes]
    assert isinstance(config, LlamaConfig)
    model = write_outline(tmp_path, config, int4=kind == "int4")
    total = sum(r.nbytes for r in external_ranges(model))
    assert total == pytest.approx(gigabytes * 1e9, rel=0.02)


def test_exported_graphs_are_as_large_as_they_say(graphs: Path) -> None:
    for (kind, gigabytes), name in large.MODELS.items():
        if kind == "exported":
            total = sum(r.nbytes for r in external_ranges(graphs / str(name) / "model.onnx"))
            assert total == pytest.approx(gigabytes * 1e9, rel=0.02)


@pytest.mark.parametrize("kind", ["fp32", "int4", "exported"])
def test_a_twin_is_small(kind: str, tmp_path: Path) -> None:
    model = large.write_twin(kind, 2, tmp_path)
    assert (tmp_path / "model.onnx.data").stat().st_size < 4e6
    if kind != "exported":
        config = large.MODELS[kind, 2]
        assert isinstance(config, LlamaConfig)
        nodes = onnx.load(model, load_external_data=False).graph.node
        assert sum(n.op_type == "GroupQueryAttention" for n in nodes) == config.num_hidden_layers
