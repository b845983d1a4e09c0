"""Ops that a build refuses: they draw random numbers, or onnxruntime has no CPU kernel for them."""

from __future__ import annotations

from furiosa_llm.builder.rules.registry import op
from furiosa_llm.builder.rules.view import MICROSOFT

_FOR_CPU = "export the model for CPU"
_UNFUSED = "fuse the graph for CPU, or not at all"
_FULL = "export the model with full attention"
_UNPACKED = "export the model without packed (padding-free) sequences"
_UNQUANTISED = "quantise the weights with MatMulNBits, or as QDQ"
_CACHED = "export the model with GroupQueryAttention instead"

op("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", random=True)

op("PagedAttention", domain=MICROSOFT, remedy=f"{_CACHED} (a decoder for CPU, one cache per sequence)")
op("SparsePagedAttention", domain=MICROSOFT, remedy=_CACHED)
op(
    "DynamicSparseAttention",
    "PackedSparseAttentionIndexer",
    "PackedSparseAttentionIndexerMerge",
    "SparseAttentionIndexer",
    domain=MICROSOFT,
    remedy=_FULL,
)
op(
    "MoEPacked", "PackedAttention", "PackedMultiHeadAttention", "RemovePadding", "RestorePadding",
    "SpeculativePrefixCommit", domain=MICROSOFT, remedy=_UNPACKED,
)  # fmt: skip
op(
    "BiasAdd", "BiasSoftmax", "BiasSplitGelu", "DecoderAttention", "DecoderMaskedSelfAttention",
    "FusedMatMulActivation", "GatedRelativePositionBias", "GemmFastGelu", "GemmaRotaryEmbedding", "GroupNorm",
    "LongformerAttention", "MatMulNBitsMlp", "MatMulNBitsQLoRA", "MatMulNBitsQkv", "MatMulPacked", "NhwcConv",
    "NhwcFusedConv", "RMSNormRotary", "RelativePositionBias", "SkipGroupNorm", "SwiGLU", domain=MICROSOFT,
    remedy=_UNFUSED,
)  # fmt: skip
op(
    "DequantizeBFP", "DequantizeWithOrder", "GemmFloat8", "MatMulBlockQuantizedFp4Weight",
    "MatMulBlockQuantizedFp8Weight", "MulInteger", "QLinearReduceMean", "QOrderedAttention", "QOrderedGelu",
    "QOrderedLayerNormalization", "QOrderedLongformerAttention", "QOrderedMatMul", "QuantizeBFP",
    "QuantizeWithOrder", "ReduceSumInteger", domain=MICROSOFT, remedy=_UNQUANTISED,
)  # fmt: skip
op(
    "ComplexMul", "ComplexMulConj", "ConvStateReplay", "GatedDeltaNetStateReplay", "HyperConnectionLowRankMix",
    "Irfft", "Mamba2Verify", "Rfft", "RouterGateUpProj", "TorchEmbedding", domain=MICROSOFT, remedy=_FOR_CPU,
)  # fmt: skip
op("EPContext", "Snpe", domain=MICROSOFT, remedy="export the model itself, not what it was compiled into for a device")
