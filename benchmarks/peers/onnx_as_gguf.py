"""A Llama-like ONNX model in genai's graph shape as a GGUF file of the same weights, for llama.cpp."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import onnx

from fixtures.filled import Range, external_ranges
from furiosa_llm.example.llama.weights import EMBEDDING
from furiosa_llm.example.smollm2.blocks import BLOCK, unpermuted_rows
from furiosa_llm.example.smollm2.gguf_weights import PARTS

_PACKED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
"""What genai's graph has as one product."""

Array = npt.NDArray[Any]


def write_gguf(model: Path, target: Path) -> None:
    """Writes the weights of `model`, with config.json beside it and all of its weights in external data.

    Symmetric 4-bit blocks of MatMulNBits are Q4_0's, bit for bit but for the scale, which becomes a float16.
    The file has no vocabulary: prompts are token ids.
    """
    config = json.loads((model.parent / "config.json").read_text())
    weights = _Weights(model)
    writer = gguf.GGUFWriter(target, arch="llama")
    _write_sizes(writer, config)
    for name, values in _tensors(weights, config):
        kind = gguf.GGMLQuantizationType.Q4_0 if values.dtype == np.uint8 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class _Weights:
    """The initializers of a model, mapped."""

    def __init__(self, model: Path) -> None:
        proto = onnx.load(model, load_external_data=False)
        self._shapes = {tensor.name: tuple(tensor.dims) for tensor in proto.graph.initializer}
        self._ranges = {found.name: found for found in external_ranges(model)}
        self._folder = model.parent

    def __contains__(self, name: str) -> bool:
        return name in self._ranges

    def values(self, name: str) -> Array:
        """The numbers of an initializer."""
        found: Range = self._ranges[name]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(found.dtype)
        path = self._folder / found.location
        return np.memmap(path, dtype=dtype, mode="r", offset=found.offset, shape=self._shapes[name])

    def product(self, scope: str) -> Array:
        """The matrix of a product as GGUF has it, a row an output: float32 [N, K], or Q4_0's bytes [N, K/32*18]."""
        dense = f"{scope}.MatMul.weight"
        if dense in self:
            return self.values(dense).T
        return q4_0(self.values(f"{dense}_Q4"), self.values(f"{dense}_scales"))


def q4_0(codes: npt.NDArray[np.uint8], scales: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """MatMulNBits' blocks in ggml's order: a float16 scale, then numbers j and j + 16 in byte j.

    Args:
        codes: [N, K/32, 16], numbers 2j and 2j + 1 in byte j, with 8 for zero.
        scales: [N, K/32].
    """
    numbers = np.stack([codes & 0x0F, codes >> 4], axis=-1).reshape(*codes.shape[:2], BLOCK)
    packed = numbers[..., : BLOCK // 2] | (numbers[..., BLOCK // 2 :] << 4)
    halves = scales.astype("<f2")[..., None].view(np.uint8)
    return np.concatenate([halves, packed], axis=-1).reshape(len(codes), -1)


def _tensors(weights: _Weights, config: dict[str, Any]) -> Iterator[tuple[str, Array]]:
    layers = config["num_hidden_layers"]
    if EMBEDDING in weights:
        yield "token_embd.weight", weights.values(EMBEDDING)
        yield "output.weight", weights.product("lm_head")
    else:
        yield "token_embd.weight", weights.product("lm_head")
    yield "output_norm.weight", weights.values(f"model.layers.{layers}.final_norm_layernorm.weight")
    for layer in range(layers):
        scope, block = f"model.layers.{layer}", f"blk.{layer}"
        for part, name in PARTS.items():
            if part.endswith("layernorm"):
                yield f"{block}.{name}.weight", weights.values(f"{scope}.{part}.weight")
            elif part not in _PACKED:
                yield f"{block}.{name}.weight", weights.product(f"{scope}.{part.removeprefix('self_')}")
        yield from _attention(block, weights.product(f"{scope}.attn.qkv_proj"), config)


def _attention(block: str, rows: Array, config: dict[str, Any]) -> Iterator[tuple[str, Array]]:
    """Queries, keys and values out of one product, the first two with the rows of a head as ggml turns them."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    width = config["head_dim"]
    parts = np.split(rows, [heads * width, (heads + kv_heads) * width])
    for part, values, count in zip(_PACKED, parts, (heads, kv_heads, 0), strict=True):
        turned = values[np.argsort(unpermuted_rows(len(values), count))] if count else values
        yield f"{block}.{PARTS[part]}.weight", turned


def _write_sizes(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
