"""Small configurations of architectures of transformers, by their type: what differs from `_DECODER`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["decoder", "encoder", "seq2seq", "speech", "image"]
VOCABULARY = 1024
CONTEXT = 512
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_DECODER: Mapping[str, object] = {
    **_IDS,
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
}
_ENCODER = {k: v for k, v in _DECODER.items() if k != "num_key_value_heads"}
_GPT: Mapping[str, object] = {
    **_IDS, "vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT
}  # fmt: skip
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
_SMALL_EXPERTS = {**_EXPERTS, "moe_intermediate_size": 48}
_DELTA = {
    **_SMALL_EXPERTS, "shared_expert_intermediate_size": 48, "head_dim": 16, "linear_key_head_dim": 16,
    "linear_value_head_dim": 16, "linear_num_key_heads": 4, "linear_num_value_heads": 8,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
_LATENT = {
    **_SMALL_EXPERTS, "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 2, "topk_group": 1,
    "n_shared_experts": 1, "first_k_dense_replace": 1,
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
    "v_head_dim": 16, "head_dim": 8,
}  # fmt: skip
_MAMBA: Mapping[str, object] = {
    **_IDS, "vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 16
}  # fmt: skip
_T5: Mapping[str, object] = {
    "vocab_size": VOCABULARY, "d_model": 64, "d_kv": 16, "d_ff": 176, "num_layers": 2, "num_decoder_layers": 2,
    "num_heads": 4, "decoder_start_token_id": 0,
}  # fmt: skip
_BART: Mapping[str, object] = {
    **_IDS, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 176, "decoder_ffn_dim": 176, "vocab_size": VOCABULARY,
    "decoder_start_token_id": 1,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Architecture:
    """One configuration: `values` go to the config class of `model_type`."""

    model_type: str
    values: Mapping[str, object] = field(default_factory=lambda: _DECODER)
    kind: Kind = "decoder"
    dims: Mapping[str, int] = field(default_factory=dict)
    """Sizes of dimensions that a graph does not tell, as `furiosa-llm build --dim` takes them, by exporters' names."""


def _decoder(model_type: str, **changed: object) -> Architecture:
    return Architecture(model_type, {**_DECODER, **changed})


ARCHITECTURES: Mapping[str, Architecture] = {
    one.model_type: one
    for one in (
        _decoder("llama"),
        _decoder("mistral", sliding_window=32),
        _decoder("mixtral", **_EXPERTS),
        _decoder("qwen2"),
        _decoder("qwen2_moe", **_SMALL_EXPERTS, shared_expert_intermediate_size=48),
        _decoder("qwen3", head_dim=16),
        _decoder("qwen3_moe", **_SMALL_EXPERTS, head_dim=16),
        _decoder("qwen3_next", **_DELTA),
        _decoder("qwen3_5_text", **_DELTA),
        _decoder("phi", hidden_size=128, num_key_value_heads=4),
        _decoder("phi3", original_max_position_embeddings=CONTEXT),
        _decoder("phimoe", **_EXPERTS),
        _decoder("gemma", head_dim=16),
        _decoder("gemma2", head_dim=16, sliding_window=32),
        _decoder("gemma3_text", head_dim=16, sliding_window=32, layer_types=["sliding_attention", "full_attention"]),
        Architecture("gpt2", _GPT),
        Architecture("gptj", {**_GPT, "rotary_dim": 8}),
        Architecture("gpt_neox", _ENCODER),
        Architecture("opt", {**_ENCODER, "ffn_dim": 176, "word_embed_proj_dim": 64}),
        Architecture("bloom", {**_IDS, "vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": 2, "n_head": 4}),
        Architecture("falcon", {**_ENCODER, "num_kv_heads": 2, "new_decoder_architecture": True}),
        Architecture("mpt", {"vocab_size": VOCABULARY, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 512}),
        _decoder("gpt_oss", **_EXPERTS, head_dim=16, sliding_window=32),
        _decoder("granite"),
        _decoder("granitemoe", **_EXPERTS),
        _decoder("olmo"),
        _decoder("olmo2"),
        _decoder("starcoder2"),
        _decoder("stablelm"),
        _decoder("cohere"),
        _decoder("cohere2", sliding_window=32),
        _decoder("nemotron", hidden_size=128),
        _decoder("smollm3"),
        _decoder("ernie4_5", head_dim=16),
        _decoder("hunyuan_v1_dense", head_dim=16),
        _decoder("glm", head_dim=16),
        _decoder("glm4", head_dim=16),
        _decoder("deepseek_v3", **_LATENT),
        Architecture("mamba", {**_MAMBA, "intermediate_size": 128, "time_step_rank": 4}),
        Architecture("mamba2", {**_MAMBA, "num_heads": 8, "head_dim": 16, "n_groups": 4, "chunk_size": 8}),
        _decoder(
            "bamba", mamba_n_heads=8, mamba_d_head=16, mamba_d_state=16, mamba_n_groups=4, mamba_chunk_size=8,
            attn_layer_indices=[1],
        ),
        _decoder("lfm2", layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False),
        Architecture("bert", _ENCODER, "encoder"),
        Architecture("roberta", _ENCODER, "encoder"),
        Architecture(
            "distilbert",
            {**_IDS, "vocab_size": VOCABULARY, "dim": 64, "hidden_dim": 256, "n_layers": 2, "n_heads": 4},
            "encoder",
        ),
        Architecture("t5", _T5, "seq2seq", {"s16": 64}),
        Architecture("bart", _BART, "seq2seq", {"s16": 64}),
        Architecture(
            "whisper", {**_BART, "num_mel_bins": 8}, "speech",
            {"audio_seq_len": 3000, "s16": 64, "s39": 9, "s12": 9},
        ),
        Architecture("vit", {**_ENCODER, "image_size": 32, "patch_size": 8}, "image"),
    )
}  # fmt: skip
