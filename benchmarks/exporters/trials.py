"""Which exports are tried: every architecture by every exporter, and the options of exporters on a few."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.exporters.architectures import ARCHITECTURES

EXPORTERS = ("genai", "optimum", "dynamo", "mobius")
ENVIRONMENTS = {"genai": "current", "optimum": "optimum", "dynamo": "current", "mobius": "current"}
"""Exporter -> the environment that it is in."""
_SCALES = Path(__file__).parent / "kv_scales.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One export."""

    exporter: str
    architecture: str
    options: Mapping[str, object] = field(default_factory=dict)

    @property
    def spelt(self) -> str:
        """The options, as people read them."""
        return ", ".join(f"{name}={value}" for name, value in self.options.items() if name != "kv_cache_scale_file")

    @property
    def name(self) -> str:
        """Unlike any other's, and fit for a folder."""
        return "-".join((self.exporter, self.architecture, self.spelt)).strip("-").replace("/", "_").replace(", ", "-")


_MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "phimoe", "gpt_oss", "granitemoe")
_INT4 = {"precision": "int4"}
_OPTIONS: tuple[tuple[str, str, Mapping[str, object]], ...] = (
    ("genai", "llama", _INT4),
    ("genai", "llama", {"precision": "int8"}),
    *(("genai", "llama", {**_INT4, "block_size": size}) for size in (16, 64, 128, 256)),
    ("genai", "llama", {**_INT4, "accuracy_level": 1}),
    ("genai", "llama", {**_INT4, "is_symmetric": "false"}),
    ("genai", "llama", {**_INT4, "op_types_to_quantize": "MatMul/Gather"}),
    ("genai", "llama", {**_INT4, "nodes_to_exclude": "/lm_head/MatMul"}),
    ("genai", "llama", {**_INT4, "algo_config": "rtn"}),
    ("genai", "llama", {**_INT4, "algo_config": "k_quant"}),
    ("genai", "llama", {**_INT4, "matmul_mixed_precision": "last_matmul:int8,mixed_layers:int8"}),
    ("genai", "llama", {**_INT4, "use_qdq": "true"}),
    ("genai", "llama", {**_INT4, "fuse_mlp_gate_up": "true"}),
    ("genai", "llama", {"exclude_embeds": "true"}),
    ("genai", "llama", {"exclude_lm_head": "true"}),
    ("genai", "llama", {"prune_lm_head": "true"}),
    ("genai", "llama", {"include_hidden_states": "true"}),
    ("genai", "llama", {"aux_hidden_state_layers": "1"}),
    ("genai", "llama", {"fuse_qkv": "false"}),
    ("genai", "llama", {"fuse_mlp_gate_up": "true"}),
    ("genai", "llama", {"num_hidden_layers": 1}),
    ("genai", "llama", {"filename": "decoder.onnx"}),
    ("genai", "llama", {"kv_cache_quant_scheme": "int8_per_tensor", "kv_cache_scale_file": str(_SCALES)}),
    ("genai", "llama", {"kv_cache_quant_scheme": "int4_per_tensor", "kv_cache_scale_file": str(_SCALES)}),
    ("genai", "gemma", {"shared_embeddings": "true"}),
    ("genai", "gemma", {**_INT4, "shared_embeddings": "true"}),
    ("genai", "gemma2", {"windowed_kv_cache": "false"}),
    ("genai", "gpt_oss", _INT4),
    ("genai", "gpt_oss", {**_INT4, "moe_quant_type": "int8", "qmoe_block_size": 64}),
    *(("optimum", "llama", {"opset": opset}) for opset in (14, 17)),
    ("optimum", "llama", {"optimize": "O2"}),
    *(("dynamo", "llama", {"opset_version": opset}) for opset in range(18, 26)),
    *(("dynamo", name, {"experts": "batched_mm"}) for name in _MIXTURES),
    ("dynamo", "llama", {"ort_fusions": "cpu"}),
    ("dynamo", "llama", {"optimize": False}),
    ("mobius", "llama", {"static-cache": True}),
    ("mobius", "llama", {"optimize": "all"}),
    ("mobius", "llama", {"dtype": "f16"}),
    ("mobius", "llama", {"ep": "cpu"}),
)
TRIALS = (
    *(Trial(exporter=exporter, architecture=name) for exporter in EXPORTERS for name in ARCHITECTURES),
    *(Trial(exporter=exporter, architecture=name, options=options) for exporter, name, options in _OPTIONS),
)
