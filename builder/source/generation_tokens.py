"""The tokens that an encoder-decoder's generation begins and ends with, from the files next to the model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from furiosa_llm.builder.errors import ModelLoadError
from furiosa_llm.builder.source.companions import eos_token_ids, read_json

_CONFIGS = ("generation_config.json", "config.json")
_START_KEYS = ("decoder_start_token_id", "bos_token_id")


def start_token(model: Path) -> tuple[int, str]:
    """The token that a completion begins with, and the file that states it; raises ModelLoadError if no file does.

    Without a configuration it is the tokenizer's padding token, because such models are trained with it.
    """
    for key in _START_KEYS:
        for name in _CONFIGS:
            value = read_json(model, name).get(key)
            if isinstance(value, int) and value >= 0:
                return value, name
    padding = read_json(model, "tokenizer.json").get("padding")
    pad = padding.get("pad_id") if isinstance(padding, Mapping) else None
    if isinstance(pad, int) and pad >= 0:
        return pad, "tokenizer.json"
    raise ModelLoadError(
        f"nothing in {model.parent} says which token a completion begins with; put the model's config.json there, or "
        'one with {"decoder_start_token_id": ..., "eos_token_id": ...}.'
    )


def end_tokens(model: Path) -> tuple[tuple[int, ...], str]:
    """The tokens that end a completion, and the file that states them; raises ModelLoadError if no file does.

    Without a configuration it is the special token that the tokenizer puts after a text.
    """
    configured = eos_token_ids(model)
    if configured:
        return configured, "config.json"
    token = _closing_token(read_json(model, "tokenizer.json"))
    if token is not None:
        return (token,), "tokenizer.json"
    raise ModelLoadError(
        f"nothing in {model.parent} says which token ends a completion; put the model's config.json there, or one with "
        '{"decoder_start_token_id": ..., "eos_token_id": ...}.'
    )


def _closing_token(tokenizer: Mapping[str, Any]) -> int | None:
    """The last special token of the tokenizer's template for one text."""
    try:
        processor = tokenizer["post_processor"]
        name = processor["single"][-1]["SpecialToken"]["id"]
        token = processor["special_tokens"][name]["ids"][-1]
    except (KeyError, IndexError, TypeError):
        return None
    return token if isinstance(token, int) else None
