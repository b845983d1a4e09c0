"""Models with random weights, made from configurations and saved as the exporters read them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.exporters.architectures import Architecture

_TOKENIZER = Path(__file__).parents[2] / "fixtures" / "zoo" / "tiny-llama-genai-fp32"
_CLASSES = {
    "decoder": "AutoModelForCausalLM",
    "encoder": "AutoModelForMaskedLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "speech": "AutoModelForSpeechSeq2Seq",
    "image": "AutoModelForImageClassification",
}


def model_of(architecture: Architecture) -> Any:
    """The model, in float32.

    Its weights are drawn anew, since exporters fold biases of zero and norms of one away, and share equal tensors.
    """
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(architecture.model_type, **architecture.values)
    model = getattr(transformers, _CLASSES[architecture.kind]).from_config(config).eval().float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.copy_(torch.randn_like(weight) / weight.shape[-1] ** 0.5)
            elif name.endswith("bias"):
                weight.copy_(torch.randn_like(weight) * 0.1)
            elif "norm" in name or "ln" in name:
                weight.copy_(1 + 0.2 * torch.randn_like(weight))
    return model


def save(model: Any, folder: Path) -> None:
    """The checkpoint in `folder`, with a tokenizer of the same vocabulary."""
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(_TOKENIZER / name, folder / name)
