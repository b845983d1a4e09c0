"""Reads SmolLM2's GGUF file: its sizes, its vocabulary, its weights under Hugging Face's names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from furiosa_llm.example.errors import ModelFileError
from furiosa_llm.example.llama.config import LlamaConfig
from furiosa_llm.example.llama.weights import EMBEDDING, FINAL_NORM, Array
from furiosa_llm.example.smollm2.blocks import Q4Weight, Q8Weight, decode_q4_1, decode_q8_0, unpermuted_rows

_TOP_LEVEL = {EMBEDDING: "token_embd.weight", FINAL_NORM: "output_norm.weight"}
PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""Hugging Face's names of a layer's weights -> GGUF's."""
_LAYER_WEIGHT = re.compile(r"model\.layers\.(\d+)\.(.+)\.weight")


class GgufWeights:
    """The weights of a Llama-architecture GGUF file, mapped and decoded one at a time.

    Raises `ModelFileError` where the file lacks a field or tensor, or holds a tensor in a type other than F32, Q4_1 or
    Q8_0.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            reader = gguf.GGUFReader(path)
        except (OSError, ValueError, KeyError, IndexError) as error:
            raise ModelFileError(
                f"{path} is not a readable GGUF file: {error}; delete it to have it fetched again"
            ) from error
        self._fields = reader.fields
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._config = LlamaConfig(
            vocab_size=self.field("llama.vocab_size"),
            hidden_size=self.field("llama.embedding_length"),
            intermediate_size=self.field("llama.feed_forward_length"),
            num_hidden_layers=self.field("llama.block_count"),
            num_attention_heads=self.field("llama.attention.head_count"),
            num_key_value_heads=self.field("llama.attention.head_count_kv"),
            head_dim=self.field("llama.rope.dimension_count"),
            max_position_embeddings=self.field("llama.context_length"),
            rms_norm_eps=self.field("llama.attention.layer_norm_rms_epsilon"),
            rope_theta=self.field("llama.rope.freq_base"),
            tie_word_embeddings="output.weight" not in self._tensors,
        )

    @property
    def config(self) -> LlamaConfig:
        """The model's sizes."""
        return self._config

    def field(self, key: str) -> Any:
        """The metadata value under `key`: a number, a string or a list of them."""
        if key not in self._fields:
            raise ModelFileError(
                f"{self._path} has no field {key!r}; this recipe needs a Llama-architecture GGUF file with a vocabulary"
            )
        return self._fields[key].contents()

    def tensor(self, name: str) -> Array:
        """The float32 weight `name`; see `LlamaWeights.tensor`."""
        found = self._find(name)
        if found.tensor_type == gguf.GGMLQuantizationType.F32:
            return np.asarray(found.data, dtype=np.float32)
        if found.tensor_type == gguf.GGMLQuantizationType.Q8_0:
            return self.q8_weight(name).dense()
        return self.q4_weight(name).dense()

    def q4_weight(self, name: str) -> Q4Weight:
        """The 4-bit blocks of the projection `name`, Q and K rows in Hugging Face's order."""
        found = self._find(name)
        self._expect_type(found, gguf.GGMLQuantizationType.Q4_1)
        weight = decode_q4_1(found.data)
        heads = self._interleaved_heads(name)
        return weight.take_rows(unpermuted_rows(len(weight.quants), heads)) if heads else weight

    def q8_weight(self, name: str) -> Q8Weight:
        """The 8-bit blocks of `name`; no Q or K projection, whose rows would need reordering."""
        found = self._find(name)
        self._expect_type(found, gguf.GGMLQuantizationType.Q8_0)
        return decode_q8_0(found.data)

    def _interleaved_heads(self, name: str) -> int:
        """Heads whose rows the file interleaves, 0 for every weight but Q and K."""
        if name.endswith("q_proj.weight"):
            return self._config.num_attention_heads
        return self._config.num_key_value_heads if name.endswith("k_proj.weight") else 0

    def _find(self, name: str) -> gguf.ReaderTensor:
        layer = _LAYER_WEIGHT.fullmatch(name)
        known = layer is not None and layer[2] in PARTS
        stored = f"blk.{layer[1]}.{PARTS[layer[2]]}.weight" if layer and known else _TOP_LEVEL.get(name)
        if stored not in self._tensors:
            raise ModelFileError(
                f"{self._path} holds no tensor for {name!r} (looked for {stored!r}); it is not the model expected here"
            )
        return self._tensors[stored]

    def _expect_type(self, found: gguf.ReaderTensor, expected: gguf.GGMLQuantizationType) -> None:
        if found.tensor_type != expected:
            raise ModelFileError(
                f"{self._path}: tensor {found.name!r} is {found.tensor_type.name}, expected {expected.name}; "
                "this recipe was written for the Q4_1 file that `furiosa_llm.example.smollm2.source` pins"
            )
