"""The files next to a model: its configuration, tokenizer and chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from furiosa_llm.builder.errors import ModelLoadError
from furiosa_llm.builder.source.beside import find_beside
from furiosa_llm.runtime.artifact.json_reader import MAX_COMPANION_NBYTES

COMPANIONS = (
    "added_tokens.json",
    "chat_template.jinja",
    "config.json",
    "genai_config.json",
    "generation_config.json",
    "merges.txt",
    "pooling.json",
    "preprocessor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
"""Files that are copied into the artifact unchanged."""

_MAX_JSON_NBYTES = 2**24
"""Of what is parsed here: a number of two characters takes eight bytes as an object."""
_LENGTH_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length")


BELOW = "onnx"
"""The folder that repositories put their .onnx files into; what belongs to them lies one up."""


def companions(model: Path) -> list[Path]:
    """The files next to `model` that belong to it; raises as `find_companion` does."""
    return [path for name in COMPANIONS if (path := find_companion(model, name)) is not None]


def find_companion(model: Path, name: str) -> Path | None:
    """The file `name` next to `model`, or above its folder `onnx`; None if there is none.

    Raises ModelLoadError for a link that leads out of the model's folder, and for what no artifact may hold.
    """
    what = f"{model.parent / name} goes with the model"
    found = find_beside(model, name, what)
    if found is None and model.absolute().parent.name == BELOW:
        found = find_beside(model, name, what, above=True)
    if found is not None and (nbytes := found.stat().st_size) > MAX_COMPANION_NBYTES:
        raise ModelLoadError(
            f"{what}, and is {nbytes} bytes long, expected at most {MAX_COMPANION_NBYTES}; mend it or remove it."
        )
    return found


def read_json(model: Path, name: str) -> dict[str, Any]:
    """The JSON object in a file next to the model; empty if there is no such file."""
    path = find_companion(model, name)
    if path is None:
        return {}
    try:
        if (nbytes := path.stat().st_size) > _MAX_JSON_NBYTES:
            raise ModelLoadError(f"{path} is {nbytes} bytes long, expected at most {_MAX_JSON_NBYTES}; mend it.")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelLoadError(f"{path} is not JSON: {error}; mend it or remove it.") from error
    if not isinstance(content, dict):
        raise ModelLoadError(f"{path} holds a {type(content).__name__}, expected a JSON object; mend it or remove it.")
    return content


def max_sequence_length(model: Path) -> int | None:
    """The longest sequence that the configuration allows, in tokens."""
    config = read_json(model, "config.json")
    genai = read_json(model, "genai_config.json").get("model", {})
    found = [config.get(key) for key in _LENGTH_KEYS]
    found.append(genai.get("context_length") if isinstance(genai, Mapping) else None)
    sizes = [size for size in found if isinstance(size, int) and size > 0]
    return min(sizes) if sizes else None


def eos_token_ids(model: Path) -> tuple[int, ...]:
    """The tokens that end a generation, from the most specific file that names any."""
    genai = read_json(model, "genai_config.json").get("model", {})
    places = (
        read_json(model, "generation_config.json"),
        genai if isinstance(genai, Mapping) else {},
        read_json(model, "config.json"),
    )
    for place in places:
        value = place.get("eos_token_id")
        if isinstance(value, int):
            return (value,)
        if isinstance(value, list) and value and all(isinstance(v, int) for v in value):
            return tuple(value)
    return ()
