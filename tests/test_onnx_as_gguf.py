"""The GGUF files that the comparison with peers makes of large ONNX models: the same numbers, where llama.cpp looks."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import numpy_helper

from benchmarks.peers.onnx_as_gguf import q4_0, write_gguf
from fixtures.filled import fill
from fixtures.outline import write_outline
from fixtures.synthetic import SPECIAL
from furiosa_llm.example.llama.configs import write_configs
from tests.smollm2.test_filled import CONFIG

_CONFIG = dataclasses.replace(CONFIG, tie_word_embeddings=True)


def _interleaved(rows: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    """Element i of a head's first half beside element i of its second, as ggml's rotation wants neighbours."""
    width = len(rows) // heads
    halves = rows.reshape(heads, 2, width // 2, -1)
    return np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(rows.shape)


@pytest.mark.parametrize("int4", [False, True], ids=["float32", "int4"])
def test_every_weight_is_there_with_the_rows_of_queries_and_keys_interleaved(tmp_path: Path, int4: bool) -> None:
    model = write_outline(tmp_path, _CONFIG, int4=int4)
    write_configs(tmp_path, _CONFIG, SPECIAL, genai=True)
    fill(model)
    write_gguf(model, tmp_path / "model.gguf")
    found = gguf.GGUFReader(tmp_path / "model.gguf")
    stored = {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in found.tensors}
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(model).graph.initializer}

    def expected(scope: str) -> npt.NDArray[Any]:
        """The matrix of a product, a row an output."""
        if not int4:
            return weights[f"{scope}.MatMul.weight"].T
        codes, scales = weights[f"{scope}.MatMul.weight_Q4"], weights[f"{scope}.MatMul.weight_scales"]
        numbers = np.stack([codes & 15, codes >> 4], -1).reshape(len(codes), -1, 32).astype(np.float32) - 8
        return (numbers * scales.astype(np.float16).astype(np.float32)[..., None]).reshape(len(codes), -1)

    assert len(stored) == 2 + 9 * _CONFIG.num_hidden_layers
    np.testing.assert_array_equal(stored["token_embd.weight"], expected("lm_head"))
    np.testing.assert_array_equal(stored["output_norm.weight"], weights["model.layers.2.final_norm_layernorm.weight"])
    for layer in range(_CONFIG.num_hidden_layers):
        queries, keys, values = np.split(expected(f"model.layers.{layer}.attn.qkv_proj"), [64, 96])
        np.testing.assert_array_equal(stored[f"blk.{layer}.attn_q.weight"], _interleaved(queries, 4))
        np.testing.assert_array_equal(stored[f"blk.{layer}.attn_k.weight"], _interleaved(keys, 2))
        np.testing.assert_array_equal(stored[f"blk.{layer}.attn_v.weight"], values)
        down = expected(f"model.layers.{layer}.mlp.down_proj")
        np.testing.assert_array_equal(stored[f"blk.{layer}.ffn_down.weight"], down)
        norm = weights[f"model.layers.{layer}.input_layernorm.weight"]
        np.testing.assert_array_equal(stored[f"blk.{layer}.attn_norm.weight"], norm)


def test_sizes_are_those_of_the_configuration(tmp_path: Path) -> None:
    model = write_outline(tmp_path, _CONFIG, int4=False)
    write_configs(tmp_path, _CONFIG, SPECIAL, genai=True)
    fill(model)
    write_gguf(model, tmp_path / "model.gguf")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    config = json.loads((tmp_path / "config.json").read_text())
    assert fields["llama.vocab_size"].contents() == config["vocab_size"]
    assert fields["llama.attention.head_count_kv"].contents() == config["num_key_value_heads"]
    assert fields["llama.rope.freq_base"].contents() == config["rope_theta"]
    assert fields["tokenizer.ggml.model"].contents() == "none"


def test_a_block_has_its_first_half_in_low_nibbles() -> None:
    numbers = np.arange(32) % 16
    codes = (numbers[0::2] | (numbers[1::2] << 4)).astype(np.uint8).reshape(1, 1, 16)
    block = q4_0(codes, np.array([[0.5]], dtype=np.float32))
    np.testing.assert_array_equal(block[0, 2:], numbers[:16] | (numbers[16:] << 4))
    assert block[0, :2].view("<f2")[0] == 0.5
