"""What is missing beside a model, and what therefore will not work."""

from __future__ import annotations

from pathlib import Path

from furiosa_llm.builder.source.companions import find_companion, read_json
from furiosa_llm.runtime.artifact.manifest import ModelInfo


def wants(model: Path, info: ModelInfo) -> tuple[str, ...]:
    """A sentence for each file or setting that `model` needs to answer in text, and has not."""
    if info.task not in ("decoder", "encoder"):
        return ()
    found = []
    if find_companion(model, "tokenizer.json") is None:
        found.append(
            "no tokenizer.json: prompts have to be token ids, unless --tokenizer gives the folder of a tokenizer"
        )
    elif info.task == "decoder" and not _has_chat_template(model):
        found.append(
            "no chat template: `generate --chat` and /v1/chat/completions are refused, unless `serve --chat-template` "
            "gives one"
        )
    if info.task == "decoder" and not info.eos_token_ids:
        found.append(
            "no end-of-sequence token in generation_config.json, genai_config.json or config.json: completions end "
            "at max_tokens only"
        )
    if info.max_sequence_length is None:
        found.append(
            "no length limit in config.json or genai_config.json: longer texts are taken than the model can read, "
            "unless --max-model-len sets a limit"
        )
    return tuple(found)


def _has_chat_template(model: Path) -> bool:
    if find_companion(model, "chat_template.jinja") is not None:
        return True
    return bool(read_json(model, "tokenizer_config.json").get("chat_template"))
