"""The JSON files that exporters put beside a model: Hugging Face's and onnxruntime-genai's."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from furiosa_llm.example.llama.config import LlamaConfig
from furiosa_llm.example.llama.onnx_writer import MODEL

CONFIG_FILES = ("config.json", "generation_config.json")
"""What `write_configs` writes for either shape."""

GENAI_CONFIG_FILES = (*CONFIG_FILES, "genai_config.json")
"""What `write_configs` writes for genai's shape."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecialTokens:
    """The token ids with a role of their own."""

    bos: int
    eos: int
    unknown: int
    padding: int


def write_configs(folder: Path, config: LlamaConfig, special: SpecialTokens, *, genai: bool) -> None:
    """Writes `CONFIG_FILES` into `folder`, or `GENAI_CONFIG_FILES` where `genai` is set."""
    write_json(folder / "config.json", _hf_config(config, special))
    write_json(folder / "generation_config.json", _generation_config(special))
    if genai:
        write_json(folder / "genai_config.json", _genai_config(config, special))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes `content` as indented JSON in UTF-8."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _hf_config(config: LlamaConfig, special: SpecialTokens) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": special.bos,
        "dtype": "float32",
        "eos_token_id": special.eos,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "pad_token_id": special.padding,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_scaling": None,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "unk_token_id": special.unknown,
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }


def _generation_config(special: SpecialTokens) -> dict[str, Any]:
    return {"bos_token_id": special.bos, "eos_token_id": special.eos, "pad_token_id": special.padding}


def _genai_config(config: LlamaConfig, special: SpecialTokens) -> dict[str, Any]:
    model = {
        "bos_token_id": special.bos,
        "context_length": config.max_position_embeddings,
        "decoder": _genai_decoder(config),
        "eos_token_id": special.eos,
        "pad_token_id": special.padding,
        "type": "llama",
        "vocab_size": config.vocab_size,
    }
    search = {
        "do_sample": False,
        "max_length": config.max_position_embeddings,
        "min_length": 0,
        "num_beams": 1,
        "num_return_sequences": 1,
        "past_present_share_buffer": True,
        "repetition_penalty": 1.0,
        "temperature": 1.0,
        "top_k": 50,
        "top_p": 1.0,
    }
    return {"model": model, "search": search}


def _genai_decoder(config: LlamaConfig) -> dict[str, Any]:
    return {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": MODEL,
        "head_size": config.head_dim,
        "hidden_size": config.hidden_size,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
    }
