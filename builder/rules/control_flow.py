"""If, Loop and Scan, closed over what they read: every rank runs all of it."""

from __future__ import annotations

from furiosa_llm.builder.rules.registry import op, whole
from furiosa_llm.builder.rules.rule import Rule
from furiosa_llm.builder.rules.view import NodeView

CLOSURE_DOMAIN = "furiosa_llm.closure"
"""The domain of an If, Loop or Scan whose graphs read nothing but their own inputs: see shapes/closures.py."""


def control_flow(view: NodeView) -> Rule:
    """Inputs, captured values and outputs are whole: nothing inside is known to the analysis."""
    return whole(view, note=f"{view.node.op_type}: replicated, with all that it reads")


op("If", domain=CLOSURE_DOMAIN, rule=control_flow, graphs=lambda _, outputs: (0, outputs))
op("Loop", domain=CLOSURE_DOMAIN, rule=control_flow, graphs=lambda inputs, outputs: (max(inputs, 2), outputs + 1))
op("Scan", domain=CLOSURE_DOMAIN, rule=control_flow, graphs=lambda inputs, outputs: (inputs, outputs))
