"""What is known about each op, in one small file for each kind of op; `registry` is the one table of all ops."""

from furiosa_llm.builder.rules import (
    attention,
    attention_microsoft,
    control_flow,
    convolution,
    einsum,
    elementwise,
    experts,
    hyper_connections,
    indexing,
    integers,
    linear_algebra,
    movement,
    quantization,
    recurrent,
    reduction,
    refused,
    replicated,
)
from furiosa_llm.builder.rules.registry import OPS, Op, keeps_weights, op_of, rule_of
from furiosa_llm.builder.rules.view import NodeView

__all__ = [
    "OPS",
    "NodeView",
    "Op",
    "attention",
    "attention_microsoft",
    "control_flow",
    "convolution",
    "einsum",
    "elementwise",
    "experts",
    "hyper_connections",
    "indexing",
    "integers",
    "keeps_weights",
    "linear_algebra",
    "movement",
    "op_of",
    "quantization",
    "recurrent",
    "reduction",
    "refused",
    "replicated",
    "rule_of",
]
