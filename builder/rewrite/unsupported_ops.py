"""Ops that no program for simulated PEs can hold, as onnxruntime has no CPU kernel for them, each with a remedy."""

from __future__ import annotations

import onnx_ir as ir

from furiosa_llm.builder.errors import UnsupportedModelError
from furiosa_llm.builder.rules.view import MICROSOFT
from furiosa_llm.builder.source.load import Source

_FOR_CPU = "export the model for CPU"
_UNFUSED = "fuse the graph for CPU, or not at all"
_FULL = "export the model with full attention"
_UNPACKED = "export the model without packed (padding-free) sequences"
_UNQUANTISED = "quantise the weights with MatMulNBits, or as QDQ"

# fmt: off
REMEDIES: dict[str, str] = {
    "PagedAttention": "export the model with GroupQueryAttention instead (a decoder for CPU, one cache per sequence)",
    "SparsePagedAttention": "export the model with GroupQueryAttention instead",
    **dict.fromkeys(("DynamicSparseAttention", "SparseAttentionIndexer"), _FULL),
    **dict.fromkeys(("PackedSparseAttentionIndexer", "PackedSparseAttentionIndexerMerge"), _FULL),
    **dict.fromkeys(("PackedAttention", "PackedMultiHeadAttention", "RemovePadding", "RestorePadding"), _UNPACKED),
    **dict.fromkeys(("MoEPacked", "SpeculativePrefixCommit"), _UNPACKED),
    **dict.fromkeys(("DecoderAttention", "DecoderMaskedSelfAttention", "LongformerAttention"), _UNFUSED),
    **dict.fromkeys(("QOrderedLongformerAttention", "QOrderedAttention", "QOrderedGelu"), _UNQUANTISED),
    **dict.fromkeys(("QOrderedLayerNormalization", "QOrderedMatMul", "QuantizeWithOrder"), _UNQUANTISED),
    **dict.fromkeys(("DequantizeWithOrder", "QuantizeBFP", "DequantizeBFP", "GemmFloat8"), _UNQUANTISED),
    **dict.fromkeys(("MatMulBlockQuantizedFp4Weight", "MatMulBlockQuantizedFp8Weight"), _UNQUANTISED),
    **dict.fromkeys(("MatMulNBitsMlp", "MatMulNBitsQLoRA", "MatMulNBitsQkv", "MatMulPacked"), _UNFUSED),
    **dict.fromkeys(("MulInteger", "ReduceSumInteger", "QLinearReduceMean"), _UNQUANTISED),
    **dict.fromkeys(("GatedRelativePositionBias", "RelativePositionBias"), _UNFUSED),
    **dict.fromkeys(("BiasAdd", "BiasSoftmax", "BiasSplitGelu", "GemmFastGelu", "SwiGLU"), _UNFUSED),
    **dict.fromkeys(("FusedMatMulActivation", "GemmaRotaryEmbedding", "RMSNormRotary"), _UNFUSED),
    **dict.fromkeys(("GroupNorm", "SkipGroupNorm", "NhwcConv", "NhwcFusedConv"), _UNFUSED),
    **dict.fromkeys(("ConvStateReplay", "GatedDeltaNetStateReplay", "Mamba2Verify"), _FOR_CPU),
    **dict.fromkeys(("HyperConnectionLowRankMix", "RouterGateUpProj"), _FOR_CPU),
    **dict.fromkeys(("ComplexMul", "ComplexMulConj", "Irfft", "Rfft", "TorchEmbedding"), _FOR_CPU),
    **dict.fromkeys(("EPContext", "Snpe"), "export the model itself, not what it was compiled into for a device"),
}
# fmt: on
"""Ops of onnxruntime's own domain that have no CPU kernel in version 1.32 -> what to do instead."""


def refuse_unsupported_ops(model: ir.Model, source: Source) -> None:
    """Raise UnsupportedModelError for the first op that onnxruntime cannot run on a CPU, on whatever shapes."""
    for node in model.graph:
        remedy = REMEDIES.get(node.op_type) if node.domain == MICROSOFT else None
        if remedy is not None:
            raise UnsupportedModelError(
                f'{source.path.name}: node {MICROSOFT}::{node.op_type} "{node.name}" has no CPU kernel in onnxruntime, '
                f"expected ops that simulated PEs can run; {remedy}."
            )
