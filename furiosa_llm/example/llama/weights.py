"""Where a graph writer takes its weights from, and the names it asks for."""

from __future__ import annotations

import math
import zlib
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


class RandomWeights:
    """Weights drawn by name and seed: norms 1 + 0.2N, matrices N/sqrt(inputs), so that activations keep their size.

    Unit norms are avoided because tools fold them away. A tensor's numbers do not depend on which others were asked
    for.
    """

    def __init__(self, config: LlamaConfig, seed: int) -> None:
        self._config = config
        self._seed = seed

    @property
    def config(self) -> LlamaConfig:
        """The model's sizes."""
        return self._config

    def tensor(self, name: str) -> Array:
        """The float32 weight `name`; see `LlamaWeights.tensor`."""
        shape = _shape_of(self._config, name)
        random = np.random.default_rng([self._seed, zlib.crc32(name.encode())])
        values: Array = random.standard_normal(shape, dtype=np.float32)
        if len(shape) == 1:
            return np.float32(1.0) + np.float32(0.2) * values
        values /= np.float32(math.sqrt(shape[1]))
        return values


def _shape_of(config: LlamaConfig, name: str) -> tuple[int, ...]:
    """The shape of the weight `name`; see `LlamaWeights.tensor`."""
    if name in (EMBEDDING, LM_HEAD):
        return config.vocab_size, config.hidden_size
    shapes = {
        "q_proj": (config.query_size, config.hidden_size),
        "k_proj": (config.kv_size, config.hidden_size),
        "v_proj": (config.kv_size, config.hidden_size),
        "o_proj": (config.hidden_size, config.query_size),
        "gate_proj": (config.intermediate_size, config.hidden_size),
        "up_proj": (config.intermediate_size, config.hidden_size),
        "down_proj": (config.hidden_size, config.intermediate_size),
    }
    return shapes.get(name.split(".")[-2], (config.hidden_size,))


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
