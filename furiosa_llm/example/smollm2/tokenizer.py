"""SmolLM2's byte-level BPE tokenizer and its companion files, made from the vocabulary inside the GGUF file."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from furiosa_llm.example.errors import ModelFileError
from furiosa_llm.example.llama.configs import SpecialTokens
from furiosa_llm.example.smollm2.gguf_weights import GgufWeights

_CONTROL_TOKEN = 3  # ggml's token type for special tokens

_DEFAULT_SYSTEM_MESSAGE = (
    "{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
)


def special_tokens(source: GgufWeights) -> SpecialTokens:
    """The ids the GGUF file names."""
    return SpecialTokens(
        bos=source.field("tokenizer.ggml.bos_token_id"),
        eos=source.field("tokenizer.ggml.eos_token_id"),
        unknown=source.field("tokenizer.ggml.unknown_token_id"),
        padding=source.field("tokenizer.ggml.padding_token_id"),
    )


def build_tokenizer(source: GgufWeights) -> Tokenizer:
    """The tokenizer: digits one by one, then byte-level BPE; no BOS is added (the GGUF says `add_bos_token` false).

    Raises `ModelFileError` when the file's vocabulary is of another kind.
    """
    kind = (source.field("tokenizer.ggml.model"), source.field("tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise ModelFileError(
            f"the GGUF's tokenizer is {kind}, expected ('gpt2', 'smollm'); its pre-tokenizer would split otherwise"
        )
    tokens: list[str] = source.field("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in source.field("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    digits, byte_level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([_added_token(token) for token in _control_tokens(source)])
    return tokenizer


def tokenizer_config(source: GgufWeights) -> dict[str, Any]:
    """The content of `tokenizer_config.json`, in Hugging Face's form."""
    tokens: list[str] = source.field("tokenizer.ggml.tokens")
    special = special_tokens(source)
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    control = _control_tokens(source)
    return {
        "add_bos_token": source.field("tokenizer.ggml.add_bos_token"),
        "add_prefix_space": source.field("tokenizer.ggml.add_space_prefix"),
        "added_tokens_decoder": {str(tokens.index(token)): {"content": token, **flags} for token in control},
        "additional_special_tokens": [tokens[special.bos], tokens[special.eos]],
        "bos_token": tokens[special.bos],
        "clean_up_tokenization_spaces": False,
        "eos_token": tokens[special.eos],
        "model_max_length": source.config.max_position_embeddings,
        "pad_token": tokens[special.padding],
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": tokens[special.unknown],
    }


def original_chat_template(source: GgufWeights) -> str:
    """The chat template (Jinja) as the GGUF file has it, with its default system message."""
    template: str = source.field("tokenizer.chat_template")
    return template


def chat_template(source: GgufWeights) -> str:
    """The chat template without its default system message, with which this 4-bit-derived model talks nonsense.

    Raises `ModelFileError` when the file's template does not contain the message that is to be taken out.
    """
    original = original_chat_template(source)
    if _DEFAULT_SYSTEM_MESSAGE not in original:
        raise ModelFileError(
            f"the GGUF's chat template has no default system message of the known text; found {original!r}; "
            "the template is not the one this recipe was written for"
        )
    return original.replace(_DEFAULT_SYSTEM_MESSAGE, "")


def _control_tokens(source: GgufWeights) -> list[str]:
    pairs = zip(source.field("tokenizer.ggml.tokens"), source.field("tokenizer.ggml.token_type"), strict=True)
    return [token for token, kind in pairs if kind == _CONTROL_TOKEN]


def _added_token(text: str) -> AddedToken:
    return AddedToken(text, special=True, normalized=False)
