"""Inline the branches of an If: the one that is always taken, or both where they are cheap and cannot fail.

The nodes of an inlined branch are split like any others; every rank runs the whole of an If that stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from furiosa_llm.builder.errors import ShapeError, UnsupportedModelError
from furiosa_llm.builder.factors.analysis import analyse
from furiosa_llm.builder.factors.probe import Probes, probe
from furiosa_llm.builder.rewrite.control_flow import constant_condition, replace_outputs, splice, take_branch
from furiosa_llm.builder.rewrite.dead_code import remove_unused
from furiosa_llm.builder.rewrite.size_folding import proven_conditions
from furiosa_llm.builder.rewrite.writer import NodeWriter
from furiosa_llm.builder.rules import op_of
from furiosa_llm.builder.rules.facts import Facts, present
from furiosa_llm.builder.shapes.closures import BRANCHES, CLOSURE_DOMAIN, nodes_within
from furiosa_llm.builder.shapes.interpreter import Interpreter

_MOST_NODES = 64
"""The most nodes of one branch to inline both: both are computed in every run."""
_OLDEST_WHERE = 9
"""The opset that introduced Where."""
_SELECTABLE = frozenset(
    (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.INT32, ir.DataType.INT64)
)
"""The types that kernels of Where accept."""


def settle_branches(model: ir.Model, given: Mapping[str, int], config: Mapping[str, object]) -> Probes:
    """Inline the Ifs of a normalised model where possible, in place, and probe the result.

    Raises UnsupportedModelError for an If that stays and whose branches give different types or shapes.
    """
    while any(_is_if(node) for node in model.graph):
        probes = probe(model, given, config, lenient=True)
        if not _inline_decided(model, probes) and not _inline_both(model, probes):
            break
        remove_unused(model)
    return probe(model, given, config)


def _is_if(node: ir.Node) -> bool:
    return node.op_type == "If" and node.domain == CLOSURE_DOMAIN


def _inline_decided(model: ir.Model, probes: Probes) -> bool:
    """Inline the branches that are taken at any sizes; returns whether there are any."""
    analysis = analyse(model.graph, probes.facts, probes.others)
    proven = proven_conditions(model, analysis, probes.kinds, probes.all_facts)
    found = False
    for node in list(model.graph):
        condition = node.inputs[0] if _is_if(node) else None
        decided = None if condition is None else proven.get(condition, constant_condition(node))
        if decided is not None:
            take_branch(model.graph, node, condition=decided)
            found = True
    return found


def _inline_both(model: ir.Model, probes: Probes) -> bool:
    """Inline both branches where that is safe, and select between their outputs; returns whether any were inlined."""
    if model.graph.opset_imports.get("", 1) < _OLDEST_WHERE:
        return False
    interpreter = Interpreter(model)
    found = False
    for node in list(model.graph):
        if _is_if(node) and all(_may_select(node, facts, interpreter) for facts in probes.all_facts):
            for old, new in _select(model.graph, node).items():
                for facts in probes.all_facts:  # a later If may read it
                    facts[new] = facts[old]
            found = True
    return found


def _may_select(node: ir.Node, facts: Facts, interpreter: Interpreter) -> bool:
    """Whether both branches may be computed at these sizes: they are total and cheap, and have outputs of one shape."""
    own, captured = node.inputs[0], [facts[present(value)] for value in node.inputs[1:]]
    around = {present(own): facts[present(own)]}
    branches = [node.attributes[name].as_graph() for name in BRANCHES]
    if len(list(nodes_within(node))) > _MOST_NODES:
        return False
    for branch in branches:
        around.update(zip(branch.inputs, captured, strict=True))
    return _are_total(node, branches, around, interpreter)


def _are_total(node: ir.Node, branches: Sequence[ir.Graph], facts: Facts, interpreter: Interpreter) -> bool:
    """Whether the branches of an If give the same shapes for any elements; their facts are added to `facts`."""
    for branch in branches:
        try:
            interpreter.interpret(branch, facts)
        except (ShapeError, UnsupportedModelError):
            return False  # at these sizes the branch is valid only if it is not taken
        if not all(_is_total(inner, facts, interpreter) for inner in branch):
            return False
    rank = len(facts[present(node.inputs[0])].shape)
    then, other = ([(facts[v].dtype, facts[v].shape) for v in branch.outputs] for branch in branches)
    return then == other and all(dtype in _SELECTABLE and len(shape) >= rank for dtype, shape in then)


def _is_total(node: ir.Node, facts: Facts, interpreter: Interpreter) -> bool:
    if node.domain:
        return False
    if node.op_type == "If":  # the next round will inline it too
        return _are_total(node, [node.attributes[name].as_graph() for name in BRANCHES], facts, interpreter)
    entry = op_of(node)
    if entry is None or entry.total is None:
        return False
    of_floats = all(value is None or facts[value].dtype.is_floating_point() for value in node.inputs)
    return entry.total == "always" or of_floats


def _select(graph: ir.Graph, node: ir.Node) -> dict[ir.Value, ir.Value]:
    """Replace an If by both of its branches; returns the value that takes the place of each output."""
    condition = node.inputs[0]
    then, other = (splice(graph, node, node.attributes[n].as_graph()) for n in BRANCHES)
    new = NodeWriter(graph, lambda number: f"{node.name}/select{number}")
    pairs = enumerate(zip(then, other, strict=True))
    chosen = [new.add("Where", [condition, *pair], str(number)) for number, pair in pairs]
    new.put_before(node)
    return replace_outputs(graph, node, chosen)
