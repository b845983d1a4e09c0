"""Where a graph writer takes its weights from, and the names it asks for."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from furiosa_llm.example.llama.config import LlamaConfig

Array = npt.NDArray[np.float32]

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


class LlamaWeights(Protocol):
    """A source of weights under Hugging Face's names, in Hugging Face's layout."""

    @property
    def config(self) -> LlamaConfig:
        """The sizes that every tensor's shape follows from."""
        ...

    def tensor(self, name: str) -> Array:
        """The float32 weight `name`: [H] for a norm, [V, H] for the embedding, [out, in] for a projection."""
        ...


def layer_weight(layer: int, part: str) -> str:
    """Name of a weight of one block, e.g. `layer_weight(3, "mlp.up_proj")` -> `model.layers.3.mlp.up_proj.weight`."""
    return f"model.layers.{layer}.{part}.weight"


def inverse_frequencies(config: LlamaConfig) -> Array:
    """Rotary frequencies [D/2] in radians per token, in the float32 steps of the reference implementation."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    powers = np.power(np.float32(config.rope_theta), exponents)
    frequencies: Array = np.float32(1.0) / powers
    return frequencies


def rotary_caches(config: LlamaConfig) -> tuple[Array, Array]:
    """Cosine and sine of every position's rotary angles, each [max_position_embeddings, D/2]."""
    positions = np.arange(config.max_position_embeddings, dtype=np.float32)
    angles = np.outer(positions, inverse_frequencies(config)).astype(np.float32)
    return np.cos(angles), np.sin(angles)
