"""Our graphs against the exporters' own: the same operations in the same order, the same results."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

import fixtures
from furiosa_llm.example.llama.config import LlamaConfig
from furiosa_llm.example.llama.genai import write_genai_graph
from furiosa_llm.example.llama.onnx_writer import MODEL, ModelWriter, write_model_files
from furiosa_llm.example.llama.optimum import write_optimum_graph
from furiosa_llm.example.llama.projection import DenseProjection
from furiosa_llm.example.llama.weights import EMBEDDING, FINAL_NORM, LM_HEAD, QKV, Array, layer_weight

ZOO = Path(fixtures.__file__).parent / "zoo"
_PARTS = (*QKV, "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_NORMS = ("input_layernorm", "post_attention_layernorm")


class ZooWeights:
    """The weights of an Optimum Llama; its products' are [in, out] and numbered in the order of the nodes."""

    def __init__(self, folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        self._config = LlamaConfig(**{field.name: content[field.name] for field in dataclasses.fields(LlamaConfig)})
        layers = range(self._config.num_hidden_layers)
        model = onnx.load(folder / MODEL)
        stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        names = [layer_weight(layer, part) for layer in layers for part in _PARTS]
        if not self._config.tie_word_embeddings:
            names.append(LM_HEAD)
        products = [name for name in stored if name.startswith("onnx::MatMul_")]
        self._tensors = {name: stored[product].T for name, product in zip(names, products, strict=True)}
        norms = [layer_weight(layer, norm) for layer in layers for norm in _NORMS]
        self._tensors |= {name: stored[name] for name in (EMBEDDING, FINAL_NORM, *norms)}

    @property
    def config(self) -> LlamaConfig:
        return self._config

    def tensor(self, name: str) -> Array:
        return self._tensors[name]


Write = Callable[[ModelWriter, ZooWeights], onnx.ModelProto]


def _genai(writer: ModelWriter, weights: ZooWeights) -> onnx.ModelProto:
    return write_genai_graph(writer, weights, DenseProjection(weights))


@pytest.fixture
def ours(write: Write, source: str, tmp_path: Path) -> Path:
    """A model written by `write` with the weights of the zoo's `source`."""
    weights = ZooWeights(ZOO / source)
    write_model_files(tmp_path, lambda writer: write(writer, weights))
    return tmp_path


@pytest.mark.parametrize(
    ("write", "source", "exported"),
    [
        pytest.param(_genai, "tiny-llama-optimum", "tiny-llama-genai-fp32", id="genai"),
        pytest.param(write_optimum_graph, "tiny-llama-optimum", "tiny-llama-optimum", id="optimum"),
        pytest.param(write_optimum_graph, "tiny-llama-9-3-optimum", "tiny-llama-9-3-optimum", id="optimum-tied"),
        pytest.param(
            write_optimum_graph, "tiny-llama-mha-tied-optimum", "tiny-llama-mha-tied-optimum", id="optimum-ungrouped"
        ),
    ],
)
def test_graph_is_the_exporters(ours: Path, exported: str) -> None:
    found, expected = (onnx.load(folder / MODEL, load_external_data=False).graph for folder in (ours, ZOO / exported))
    assert len(found.node) == len(expected.node)
    # Where an exporter places a constant among the nodes before its use means nothing.
    assert _operations(found) == _operations(expected)
    assert list(found.input) == list(expected.input)
    assert list(found.output) == list(expected.output)


@pytest.mark.parametrize("write", [pytest.param(_genai, id="genai"), pytest.param(write_optimum_graph, id="optimum")])
@pytest.mark.parametrize("source", ["tiny-llama-optimum", "tiny-llama-9-3-optimum", "tiny-llama-mha-tied-optimum"])
@pytest.mark.parametrize(("sequence", "past"), [(9, 0), (1, 9)], ids=["prefill", "decode"])
def test_results_equal_the_exported_model(ours: Path, source: str, sequence: int, past: int) -> None:
    config = ZooWeights(ZOO / source).config
    expected = _run(ZOO / source, config, sequence, past)
    found = _run(ours, config, sequence, past)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-5 * float(np.abs(value).max()), err_msg=name)


def _operations(graph: onnx.GraphProto) -> list[str]:
    return [node.op_type for node in graph.node if node.op_type != "Constant"]


def _run(folder: Path, config: LlamaConfig, sequence: int, past: int) -> dict[str, npt.NDArray[Any]]:
    session = ort.InferenceSession(folder / MODEL, providers=["CPUExecutionProvider"])
    random = np.random.default_rng(0)
    values: dict[str, npt.NDArray[Any]] = {
        "input_ids": random.integers(0, config.vocab_size, (2, sequence)),
        "attention_mask": np.ones((2, past + sequence), dtype=np.int64),
        "position_ids": np.tile(np.arange(past, past + sequence), (2, 1)),
    }
    for layer in range(config.num_hidden_layers):
        for part in ("key", "value"):
            shape = (2, config.num_key_value_heads, past, config.head_dim)
            values[f"past_key_values.{layer}.{part}"] = random.standard_normal(shape, dtype=np.float32)
    names = sorted(output.name for output in session.get_outputs())
    inputs = {declared.name: values[declared.name] for declared in session.get_inputs()}
    return dict(zip(names, session.run(names, inputs), strict=True))
