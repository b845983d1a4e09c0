"""Factor analysis: one topological pass of the op rules, which ties every dimension of the graph to its factors."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import onnx_ir as ir

from furiosa_llm.builder.factors import Factor, FactorConflict, concatenation, product, unify
from furiosa_llm.builder.rule import DimExpr, Rule, Signature, parse
from furiosa_llm.builder.rules import NodeView, rule_of
from furiosa_llm.builder.shapes import Facts

Port = tuple[int, int]
"""An operand's number and one of its dimensions."""


@dataclasses.dataclass(slots=True, kw_only=True)
class NodeInfo:
    """What the analysis found out about one node."""

    node: ir.Node
    rule: Rule
    full_inputs: set[Port]
    """Input dimensions that must be whole on every rank."""
    full_outputs: set[Port]
    """Output dimensions that are computed whole, even if their factor is split."""
    reduced: list[Factor]
    """What is contracted; if split, the output is a partial sum."""
    looked_up: list[Factor]
    """What indexes a table; if split, the output is a partial sum."""
    symbols: Mapping[str, Factor]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Analysis:
    """The factors of every value of a graph."""

    graph: ir.Graph
    facts: Facts
    others: Facts
    nodes: tuple[NodeInfo, ...]
    dims: Mapping[ir.Value, Sequence[Factor]]
    pinned: frozenset[Factor]
    """Leaves that ops use inside, which may never be split."""

    def is_dynamic(self, value: ir.Value, dim: int) -> bool:
        """Whether a dimension's size differs from run to run."""
        return self.facts[value].shape[dim] != self.others[value].shape[dim]


def analyse(graph: ir.Graph, facts: Facts, others: Facts) -> Analysis:
    """Apply the rule of every node in order; `facts` and `others` are the shapes at two sets of input sizes."""
    dims = {value: [Factor(size) for size in fact.shape] for value, fact in facts.items()}
    nodes: list[NodeInfo] = []
    pins: list[Factor] = []
    for node in graph:
        view = NodeView(node, facts, others)
        rule = rule_of(view)
        info, pinned = _apply(view, rule, dims)
        nodes.append(info)
        pins.extend(pinned)
    return Analysis(
        graph=graph,
        facts=facts,
        others=others,
        nodes=tuple(nodes),
        dims=dims,
        pinned=frozenset(leaf for factor in pins for leaf in factor.leaves()),
    )


def _apply(view: NodeView, rule: Rule, dims: Mapping[ir.Value, list[Factor]]) -> tuple[NodeInfo, list[Factor]]:
    node, signature = view.node, parse(rule.text)
    symbols: dict[str, Factor] = {}
    ports = list(_ports(node, signature))
    unlinked: set[str] = set()
    sizes = {**_alone(ports, view.facts), **rule.sizes}
    for value, operand, _, _ in ports:
        found = f"{node.op_type} {node.name}: {rule.text} does not fit {view.facts[value].shape}"
        assert len(operand) == len(dims[value]), found
        for factor, expression in zip(dims[value], operand, strict=True):
            if expression.segments and not _link(factor, expression, symbols, sizes):
                unlinked |= expression.symbols
    full: tuple[set[Port], set[Port]] = set(), set()
    for _, operand, side, port in ports:
        for d, expression in enumerate(operand):
            if expression.kind == "full" or expression.symbols & (signature.full | unlinked):
                full[side].add((port, d))
    info = NodeInfo(
        node=node,
        rule=rule,
        full_inputs=full[0],
        full_outputs=full[1],
        reduced=[symbols[s] for s in sorted(signature.reduce) if s in symbols],
        looked_up=[symbols[s] for s in sorted(signature.lookup) if s in symbols],
        symbols=symbols,
    )
    return info, [symbols[s] for s in signature.pin if s in symbols]


def _ports(node: ir.Node, signature: Signature) -> Iterator[tuple[ir.Value, tuple[DimExpr, ...], int, int]]:
    """Every value of the node with its operand, side (0: inputs, 1: outputs) and number; absent ones left out."""
    for side, (values, operands) in enumerate(((node.inputs, signature.inputs), (node.outputs, signature.outputs))):
        for port, (value, operand) in enumerate(zip(values, operands, strict=False)):
            if value is not None and operand is not None:
                yield value, operand, side, port


def _alone(ports: list[tuple[ir.Value, tuple[DimExpr, ...], int, int]], facts: Facts) -> dict[str, int]:
    """The sizes of symbols that stand alone in some dimension."""
    return {
        expression.segments[0][0]: size
        for value, operand, _, _ in ports
        for expression, size in zip(operand, facts[value].shape, strict=False)
        if expression.kind == "product" and len(expression.segments[0]) == 1
    }


def _link(factor: Factor, expression: DimExpr, symbols: dict[str, Factor], sizes: Mapping[str, int]) -> bool:
    """Tie a dimension to its symbols; False if they have no common refinement."""
    if expression.kind == "product" and len(expression.segments[0]) == 1:
        symbol = expression.segments[0][0]
        if symbol not in symbols:
            symbols[symbol] = factor
            return True
    segments = [[_symbol(name, symbols, sizes) for name in names] for names in expression.segments]
    try:
        if expression.kind == "product":
            unify([factor], segments[0])
        else:
            unify([factor], [concatenation([product(segment) for segment in segments])])
    except FactorConflict:
        return False
    return True


def _symbol(name: str, symbols: dict[str, Factor], sizes: Mapping[str, int]) -> Factor:
    if name not in symbols:
        symbols[name] = Factor(sizes[name])
    return symbols[name]
