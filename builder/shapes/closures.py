"""If, Loop and Scan as closures: nodes whose graphs read nothing but their own inputs.

In ONNX a branch or a body may read any value around it, although the value is not an input of the node: every pass that
follows inputs (dead code, consumers, placements, segments) would miss it. `rewrite.control_flow.close` makes such
captured values inputs of the node and of its graphs, and gives the node CLOSURE_DOMAIN; `write.closures` writes the
node back in ONNX's form.
"""

from __future__ import annotations

import itertools
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
    """Every node in the graphs of `node`, at any depth: a graph's, then those of the graphs in it."""
    return itertools.chain.from_iterable(graphs_within(node))


def graphs_within(node: ir.Node) -> Iterator[ir.Graph]:
    """Every graph in `node`, at any depth, each in front of those in it."""
    return itertools.chain.from_iterable(with_inner(graph) for graph in graphs_of(node))


def with_inner(graph: ir.Graph) -> Iterator[ir.Graph]:
    """`graph`, then every graph in it, at any depth, each in front of those in it: work in proportion to the nodes."""
    waiting = [graph]
    while waiting:
        graph = waiting.pop()
        yield graph
        waiting.extend(reversed([inner for node in graph for inner in graphs_of(node)]))
