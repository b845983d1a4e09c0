"""What the partitioner knows of each op, one small file per kind of op; `registry` is the one table of all of them."""

from furiosa_llm.builder.rules import (
    attention,
    control_flow,
    elementwise,
    experts,
    indexing,
    linear_algebra,
    quantization,
    reduction,
    structure,
)
from furiosa_llm.builder.rules.registry import RULES, SHAPES, WEIGHT_MOVERS, NodeView, rule_of

__all__ = [
    "RULES",
    "SHAPES",
    "WEIGHT_MOVERS",
    "NodeView",
    "attention",
    "control_flow",
    "elementwise",
    "experts",
    "indexing",
    "linear_algebra",
    "quantization",
    "reduction",
    "rule_of",
    "structure",
]
