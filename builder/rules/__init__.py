"""What the partitioner knows of each op, one small file per kind of op; `registry` is the one table of all of them."""

from furiosa_llm.builder.rules import (
    attention,
    attention_microsoft,
    control_flow,
    convolution,
    einsum,
    elementwise,
    experts,
    indexing,
    integers,
    linear_algebra,
    movement,
    quantization,
    recurrent,
    reduction,
    replicated,
)
from furiosa_llm.builder.rules.registry import RULES, SHAPES, WEIGHT_MOVERS, NodeView, rule_of

__all__ = [
    "RULES",
    "SHAPES",
    "WEIGHT_MOVERS",
    "NodeView",
    "attention",
    "attention_microsoft",
    "control_flow",
    "convolution",
    "einsum",
    "elementwise",
    "experts",
    "indexing",
    "integers",
    "linear_algebra",
    "movement",
    "quantization",
    "recurrent",
    "reduction",
    "replicated",
    "rule_of",
]
