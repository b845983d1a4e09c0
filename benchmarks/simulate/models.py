"""The costs of the measured models: from graphs that exporters wrote, or from outlines of published sizes."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fixtures.outline import write_outline
from furiosa_llm.builder.lower.step_costs import VERSION, Attention, StepCosts, Traffic, Weights
from furiosa_llm.example.llama.config import LlamaConfig
from furiosa_llm.simulate.model import Costs, costs_of_model, planned_size

_ROOT = Path(__file__).parents[2]
_CACHE = _ROOT / "build" / "simulate"
_GRAPHS = {
    "llama-3.1-8b": "llama-3.1-8b-dynamo-op21-fp16",
    "llama-3-70b": "llama-3.1-70b-dynamo-op21-bf16",
    "llama-3.1-70b": "llama-3.1-70b-dynamo-op21-bf16",
    "llama-3.3-70b": "llama-3.1-70b-dynamo-op21-bf16",
    "llama-3.1-405b": "llama-3.1-405b-genai-bf16-cuda",
    "mixtral-8x7b": "mixtral-8x7b-dynamo-op21-bf16",
}


def _sizes(layers: int, hidden: int, inner: int, heads: int, kv: int, vocabulary: int, head: int = 128) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        head_dim=head,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_theta=5e5,
        tie_word_embeddings=False,
    )


_OUTLINES = {
    "qwen3-32b": _sizes(64, 5120, 25600, 64, 8, 151936),
    "qwen3-8b": _sizes(36, 4096, 12288, 32, 8, 151936),
    "exaone-3.5-32b": _sizes(64, 5120, 27392, 40, 8, 102400),
    "llama-2-7b": _sizes(32, 4096, 11008, 32, 32, 32000),
    "llama-2-70b": _sizes(80, 8192, 28672, 64, 8, 32000),
    "mistral-7b": _sizes(32, 4096, 14336, 32, 8, 32000),
    "codellama-34b": _sizes(48, 8192, 22016, 64, 8, 32000),
    # Two matrices of 16384 instead of three: as many bytes in three of 10,922.
    "gpt-j-6b": _sizes(28, 4096, 10922, 16, 16, 50400, head=256),
}
"""The sizes in the models' own config.json."""
MODELS = (*_GRAPHS, *_OUTLINES)


@functools.cache
def costs_of(model: str, size: int) -> StepCosts:
    """The costs at a tensor parallel size; kept in build/ between runs."""
    size = planned_size(size)
    file = _CACHE / f"{model}-tp{size}-{VERSION}.json"
    if not file.exists():
        found = _model(model)
        file.write_text(json.dumps(dataclasses.asdict(found.at(size)), indent=1))
    return _from_json(json.loads(file.read_text()))


@functools.cache
def _model(model: str) -> Costs:
    folder = _CACHE / model
    if model in _GRAPHS:
        folder = _ROOT / "fixtures" / "graphs" / _GRAPHS[model]
    elif not (folder / "model.onnx").exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_outline(folder, _OUTLINES[model])
    _CACHE.mkdir(parents=True, exist_ok=True)
    return costs_of_model(folder / "model.onnx")


def _from_json(found: Mapping[str, Any]) -> StepCosts:
    """As `costs_of` keeps them."""
    return StepCosts(
        **{
            **found,
            "weights": tuple(Weights(**one) for one in found["weights"]),
            "attention": tuple(Attention(**one) for one in found["attention"]),
            "traffic": tuple(Traffic(**one) for one in found["traffic"]),
        }
    )
