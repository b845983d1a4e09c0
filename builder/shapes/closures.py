"""If, Loop and Scan as closures: nodes whose graphs read nothing but their own inputs.

In ONNX a branch or a body may read any value around it, although the value is not an input of the node: every pass that
follows inputs (dead code, consumers, placements, segments) would miss it. `rewrite.control_flow.close` makes such
captured values inputs of the node and of its graphs, and gives the node CLOSURE_DOMAIN; `write.closures` writes the
node back in ONNX's form.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from furiosa_llm.builder.rules import OPS
from furiosa_llm.builder.rules.control_flow import CLOSURE_DOMAIN as CLOSURE_DOMAIN

CAPTURED = "captured"
"""The attribute of a closure that says how many of the last inputs, of the node and of each graph, are captured."""
BRANCHES = ("then_branch", "else_branch")
"""The branches of an If: taken if the condition holds, and if it does not."""


def is_control_flow(node: ir.Node) -> bool:
    """Whether a node is an If, Loop or Scan, closed or not."""
    return (CLOSURE_DOMAIN, node.op_type) in OPS and node.domain in ("", CLOSURE_DOMAIN)


def graphs_of(node: ir.Node) -> list[ir.Graph]:
    """The graphs among the attributes of a node."""
    graphs: list[ir.Graph] = []
    for attribute in node.attributes.values():
        if attribute.type is ir.AttributeType.GRAPH:
            graphs.append(attribute.as_graph())
        elif attribute.type is ir.AttributeType.GRAPHS:
            graphs.extend(attribute.as_graphs())
    return graphs


def num_captured(node: ir.Node) -> int:
    """How many of the last inputs of a node are captured values."""
    return node.attributes[CAPTURED].as_int() if node.domain == CLOSURE_DOMAIN else 0


def nodes_within(node: ir.Node) -> Iterator[ir.Node]:
    """Every node in the graphs of `node`, at any depth."""
    for graph in graphs_of(node):
        yield from ir.traversal.RecursiveGraphIterator(graph)


def graphs_within(node: ir.Node) -> Iterator[ir.Graph]:
    """Every graph in `node`, at any depth."""
    for graph in graphs_of(node):
        yield graph
        for inner in graph:
            yield from graphs_within(inner)
