"""Costs of nodes in small models."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from furiosa_llm.builder.lower.check_shapes import interpreter, local_shape
from furiosa_llm.builder.lower.emit import lower
from furiosa_llm.builder.plan.outcome import Outcome
from furiosa_llm.builder.rules.cost import Cost
from furiosa_llm.builder.rules.facts import Facts
from furiosa_llm.builder.rules.registry import costs_of
from furiosa_llm.builder.rules.view import NodeView
from furiosa_llm.builder.shapes.interface import SizeSet, concrete
from furiosa_llm.builder.shapes.interpreter import Interpreter
from furiosa_llm.runtime.artifact.layout import Mesh
from tests.support.builder.graphs import Weights, model
from tests.support.builder.op_case import OpCase
from tests.support.builder.plans import Assignment, Prepared, prepare_proto

SIZES = SizeSet(batch=2, sequence=4, past=6, encoder=6, others=(7,) * 8)


def op_name(node: ir.Node | onnx.NodeProto) -> str:
    """As op cases name it."""
    return f"{node.domain}.{node.op_type}" if node.domain else node.op_type


def cost(inputs: str, nodes: str, weights: Weights | None = None, *, opset: int = 23) -> Cost:
    """What the nodes of a model in ONNX's text format cost; its inputs have the sizes that are written there."""
    parsed = ir.from_proto(model(inputs, "float y", nodes, weights, opset=opset))
    sizes = {str(v.name): v.shape.numpy() for v in parsed.graph.inputs if v.shape is not None}
    facts = Interpreter(parsed).run_inside(sizes)
    return sum(costs_of(parsed.graph, facts, opset).values(), Cost())


def views_in(case: OpCase) -> list[NodeView]:
    """The nodes of the case's op."""
    prepared = prepare_proto(case.model())
    facts = facts_of(prepared)
    nodes = [node for node in prepared.model.graph if op_name(node).endswith(case.op)]
    return [NodeView(node, facts, facts, case.opset) for node in nodes]


def facts_of(prepared: Prepared) -> Facts:
    """Facts of the unsplit model."""
    return Interpreter(prepared.model).run_inside(concrete(prepared.probes.kinds, SIZES))


def cost_of_op(graph: ir.Graph, facts: Facts, opset: int, op: str) -> Cost:
    """What the nodes of one op cost together."""
    return sum((cost for node, cost in costs_of(graph, facts, opset).items() if op_name(node) == op), Cost())


def cost_on_a_rank(
    prepared: Prepared, mesh: Mesh, assignment: Assignment, outcome: Outcome, opset: int, op: str
) -> Cost:
    """What the nodes of one op cost each rank of a split model."""
    lowered = lower(prepared.analysis, mesh, assignment, outcome, prepared.source.model)
    shapes = concrete(prepared.probes.kinds, SIZES)
    local = {name: local_shape(lowered.input_layouts[name], shape, mesh) for name, shape in shapes.items()}
    facts = interpreter(ir.Model(lowered.graph, ir_version=10), mesh).run_inside(local)
    return cost_of_op(lowered.graph, facts, opset, op)
