"""A tokenizer that puts special tokens around a text, and whose file asks for padding and cutting."""

from __future__ import annotations

from pathlib import Path

import tokenizers
from tokenizers.processors import TemplateProcessing

from furiosa_llm.runtime.tokens.tokenizer import Tokenizer


def bracketed_tokenizer(folder: Path) -> Tokenizer:
    """Words as tokens, [CLS] and [SEP] around a text; the file asks for padding to 6 and for cutting at 2."""
    words = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "a": 3, "b": 4, "c": 5}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[PAD]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    made.enable_padding(length=6)
    made.enable_truncation(2)
    made.save(str(folder / "tokenizer.json"))
    return Tokenizer.from_folder(folder)
