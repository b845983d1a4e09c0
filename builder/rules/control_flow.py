"""If, Loop and Scan, closed over what they read: every rank runs all of it."""

from __future__ import annotations

from furiosa_llm.builder.rules.registry import NodeView, rule, whole
from furiosa_llm.builder.rules.rule import Rule
from furiosa_llm.builder.shapes.closures import CLOSURE_DOMAIN


@rule("If", "Loop", "Scan", domain=CLOSURE_DOMAIN)
def control_flow(view: NodeView) -> Rule:
    """Inputs, captured values and outputs are whole: nothing inside is known to the analysis."""
    return whole(view, note=f"{view.node.op_type}: replicated, with all that it reads")
