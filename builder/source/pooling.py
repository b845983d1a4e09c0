"""The files that sentence-transformers puts next to an encoder, as one file in the artifact: pooling.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from furiosa_llm.builder.errors import ModelLoadError
from furiosa_llm.builder.source.companions import find_companion, read_json
from furiosa_llm.runtime.artifact.pooling import POOLING_NAME, Pooling, PoolingType

_MODULES = "modules.json"
_MODES: Mapping[str, PoolingType] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
}
_MODE_PREFIX = "pooling_mode_"
_INSTEAD = f"remove {_MODULES}, or write a {POOLING_NAME} beside the model (see docs/encoders.md)."


def pooling_json(model: Path) -> bytes | None:
    """The bytes of pooling.json from the modules.json next to `model`; None without modules.json, or with pooling.json.

    Raises ModelLoadError for modules that an artifact cannot apply, because vectors without them would differ.
    """
    modules = _modules(model)
    if modules is None or find_companion(model, POOLING_NAME):
        return None
    kinds = [kind for kind, _ in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise ModelLoadError(
            f"{model.parent / _MODULES} has the modules {', '.join(kinds)}, expected Transformer, Pooling and possibly "
            f"Normalize: an artifact computes no others; {_INSTEAD}"
        )
    limit = read_json(model, "sentence_bert_config.json").get("max_seq_length")
    told = Pooling(
        pooling=_mode(model, modules[1][1]),
        normalize="Normalize" in kinds,
        max_sequence_length=limit if isinstance(limit, int) and limit > 0 else None,
    )
    return told.to_bytes()


def _modules(model: Path) -> list[tuple[str, str]] | None:
    """The modules' kinds and folders, in order."""
    path = find_companion(model, _MODULES)
    if path is None:
        return None
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        return [(entry["type"].rpartition(".")[2], entry["path"]) for entry in entries]
    except (OSError, ValueError, RecursionError, TypeError, KeyError, AttributeError) as error:
        raise ModelLoadError(
            f"{path} is not a list of modules, each with type and path: {error!r:.200}; mend it, or {_INSTEAD}"
        ) from error


def _mode(model: Path, folder: str) -> PoolingType:
    name = f"{folder}/config.json"
    config: dict[str, Any] = read_json(model, name)
    wanted = [key for key, value in config.items() if key.startswith(_MODE_PREFIX) and value is True]
    if len(wanted) != 1 or wanted[0] not in _MODES:
        raise ModelLoadError(
            f"{model.parent / name} asks for {', '.join(wanted) or 'no pooling'}, expected one of {', '.join(_MODES)}; "
            f"{_INSTEAD}"
        )
    return _MODES[wanted[0]]
