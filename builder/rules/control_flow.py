"""If, Loop and Scan, closed over what they read: every rank runs all of it."""

from __future__ import annotations

from furiosa_llm.builder.rules.cost import Cost
from furiosa_llm.builder.rules.registry import costs_of, op, whole
from furiosa_llm.builder.rules.rule import Rule
from furiosa_llm.builder.rules.view import NodeView

CLOSURE_DOMAIN = "furiosa_llm.closure"
"""The domain of an If, Loop or Scan whose graphs read nothing but their own inputs: see shapes/closures.py."""


def control_flow(view: NodeView) -> Rule:
    """Inputs, captured values and outputs are whole: nothing inside is known to the analysis."""
    return whole(view, note=f"{view.node.op_type}: replicated, with all that it reads")


def _control_flow_cost(view: NodeView) -> Cost:
    """The dearer branch of an If, every iteration of a Loop or Scan; the view has the inner graphs' facts, too."""
    if view.node.op_type == "If":
        branches = [_inside(view, f"{name}_branch") for name in ("then", "else")]
        return max(branches, key=lambda cost: (cost.flops, cost.nbytes_read + cost.nbytes_written))
    return _inside(view, "body") * (_loop_length(view) if view.node.op_type == "Loop" else _scan_length(view))


def _inside(view: NodeView, name: str) -> Cost:
    graph = view.node.attributes[name].as_graph()
    return sum(costs_of(graph, view.facts, view.opset).values(), Cost())


def _loop_length(view: NodeView) -> int:
    trips = view.fact(0).value if view.has(0) else None
    return 1 if trips is None else max(int(trips.item()), 0)


def _scan_length(view: NodeView) -> int:
    """The number of iterations: the dimension of the first scanned input that the body does not see."""
    inner = view.node.attributes["body"].as_graph().inputs
    port = next(p for p, value in enumerate(inner) if view.rank(p) > len(view.facts[value].shape))
    axis: int = view.attribute("scan_input_axes", (0,))[0]
    return view.shape(port)[axis]


op("If", domain=CLOSURE_DOMAIN, rule=control_flow, graphs=lambda _, outputs: (0, outputs), cost=_control_flow_cost)
op(
    "Loop",
    domain=CLOSURE_DOMAIN,
    rule=control_flow,
    graphs=lambda inputs, outputs: (max(inputs, 2), outputs + 1),
    cost=_control_flow_cost,
)
op(
    "Scan",
    domain=CLOSURE_DOMAIN,
    rule=control_flow,
    graphs=lambda inputs, outputs: (inputs, outputs),
    cost=_control_flow_cost,
)
