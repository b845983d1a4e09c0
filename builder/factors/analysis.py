"""Factor analysis: one topological pass applies the op rules and ties every dimension of the graph to its factors."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence, Set

import onnx_ir as ir

from furiosa_llm.builder.errors import ShapeError
from furiosa_llm.builder.factors.factor import Factor, FactorConflictError, concatenation, prefix, product, unify
from furiosa_llm.builder.rules import NodeView, keeps_weights, rule_of
from furiosa_llm.builder.rules.rule import DimExpr, Rule, Signature, parse
from furiosa_llm.builder.shapes.interpreter import Facts

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
    contracts: bool
    """Whether the node contracts a dimension, even one that must be whole."""
    reduced: list[Factor]
    """The contracted factors; if one is split, the output is a partial sum."""
    looked_up: list[Factor]
    """The factors that index a table; if one is split, the output is a partial sum."""
    symbols: Mapping[str, Factor]
    """The rule's symbols; attributes must state their local sizes."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Analysis:
    """The factors of every value of a graph."""

    graph: ir.Graph
    facts: Facts
    others: Facts
    nodes: tuple[NodeInfo, ...]
    dims: Mapping[ir.Value, Sequence[Factor]]
    pinned: frozenset[Factor]
    """Leaves that ops use internally, which may never be split."""

    def is_dynamic(self, value: ir.Value, dim: int) -> bool:
        """Whether a dimension's size differs from run to run."""
        return self.facts[value].shape[dim] != self.others[value].shape[dim]


def analyse(graph: ir.Graph, facts: Facts, others: Facts) -> Analysis:
    """Apply the rule of every node in order; `facts` and `others` are the shapes at two sets of input sizes."""
    dims = {value: [Factor(size) for size in fact.shape] for value, fact in facts.items()}
    nodes: list[NodeInfo] = []
    pins: list[Factor] = []
    opset = graph.opset_imports.get("", 1)
    for node in graph:
        view = NodeView(node, facts, others, opset)
        rule = rule_of(view)
        info, pinned = _apply(view, rule, dims)
        nodes.append(info)
        pins.extend((*pinned, *_size_vectors(info, dims)))
    return Analysis(
        graph=graph,
        facts=facts,
        others=others,
        nodes=tuple(nodes),
        dims=dims,
        pinned=frozenset(leaf for factor in pins for leaf in factor.leaves()),
    )


def _apply(view: NodeView, rule: Rule, dims: Mapping[ir.Value, list[Factor]]) -> tuple[NodeInfo, list[Factor]]:
    signature = parse(rule.text)
    symbols: dict[str, Factor] = {}
    unlinked: set[str] = set()
    uses = list(_uses(view, signature))
    sizes = {**_sizes_of_lone_symbols(uses, view.facts), **rule.sizes}
    for use in uses:
        if len(use.operand) != len(dims[use.value]):
            raise ShapeError(
                f'node {view.node.op_type} "{view.node.name}" does not fit its operands: "{use.value.name}" has the '
                f"shape {list(view.facts[use.value].shape)}, expected {len(use.operand)} dimensions ({rule.text}); "
                "the model is damaged, export it again."
            )
        for factor, expression in zip(dims[use.value], use.operand, strict=True):
            if expression.segments and not _link(factor, expression, symbols, sizes):
                unlinked |= expression.symbols
    unlinked = _with_companions(unlinked, uses)
    whole = signature.full | unlinked
    # A symbol that could not be linked is whole on every rank: not contracted or looked up in parts, of global size.
    linked = symbols.keys() - unlinked
    info = NodeInfo(
        node=view.node,
        rule=rule,
        full_inputs=_whole_ports(uses, whole, is_output=False),
        full_outputs=_whole_ports(uses, whole, is_output=True),
        contracts=bool(signature.reduce),
        reduced=[symbols[s] for s in sorted((signature.reduce & linked) - signature.full)],
        looked_up=[symbols[s] for s in sorted(signature.lookup & linked)],
        symbols={s: factor if s in linked else Factor(factor.find().size) for s, factor in symbols.items()},
    )
    return info, [symbols[s] for s in sorted(signature.pin & symbols.keys())]


def _size_vectors(info: NodeInfo, dims: Mapping[ir.Value, list[Factor]]) -> Iterator[Factor]:
    """The dimensions of vectors of sizes and positions, never split because every rank computes with all elements."""
    ports = {operand.port for operand in info.rule.shape_operands}
    vectors = [v for port, v in enumerate(info.node.inputs) if port in ports and v is not None]
    if info.rule.ignores_values:
        vectors += info.node.outputs
    for value in vectors:
        yield from dims[value]


@dataclasses.dataclass(frozen=True, slots=True)
class _Use:
    """One operand of a node: the value, what the rule says of it, and its place."""

    value: ir.Value
    operand: tuple[DimExpr, ...]
    port: int
    is_output: bool


def _uses(view: NodeView, signature: Signature) -> Iterator[_Use]:
    """Every present input and output of the node, each with its operand."""
    sides = ((view.node.inputs, signature.inputs), (view.node.outputs, signature.outputs))
    for is_output, (values, operands) in enumerate(sides):
        for port, value in enumerate(values):
            if value is None:
                continue
            operand = operands[port] if port < len(operands) else None
            if operand is None:  # The rule does not mention the value, which may mean anything, so it must be whole.
                operand = (DimExpr("full"),) * len(view.facts[value].shape)
            yield _Use(value, operand, port, bool(is_output))


def _whole_ports(uses: Sequence[_Use], whole: Set[str], *, is_output: bool) -> set[Port]:
    return {
        (use.port, d)
        for use in uses
        if use.is_output is is_output
        for d, expression in enumerate(use.operand)
        if expression.kind == "full" or expression.symbols & whole
    }


def _with_companions(symbols: set[str], uses: Sequence[_Use]) -> set[str]:
    """`symbols`, and those symbols that share a dimension with them: a dimension cannot be both whole and split."""
    shared = {s for use in uses for e in use.operand if e.symbols & symbols for s in e.symbols}
    return symbols if shared <= symbols else _with_companions(symbols | shared, uses)


def _sizes_of_lone_symbols(uses: Sequence[_Use], facts: Facts) -> dict[str, int]:
    """The sizes of symbols that stand alone in some dimension."""
    return {
        expression.segments[0][0]: size
        for use in uses
        for expression, size in zip(use.operand, facts[use.value].shape, strict=False)
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
        if expression.kind == "prefix":
            assert expression.name is not None
            unify([factor], [symbols.setdefault(expression.name, prefix(factor.find().size, segments[0]))])
        elif expression.kind == "product":
            unify([factor], segments[0])
        else:
            unify([factor], [concatenation([product(segment) for segment in segments])])
    except FactorConflictError:
        if expression.name is not None:
            symbols.setdefault(expression.name, Factor(factor.find().size))  # attributes may mention it
        return False
    return True


def _symbol(name: str, symbols: dict[str, Factor], sizes: Mapping[str, int]) -> Factor:
    if name not in symbols:
        symbols[name] = Factor(sizes[name])
    return symbols[name]


def find_weight_derived(analysis: Analysis) -> set[ir.Value]:
    """Initializers, values that are computed from nothing else, and values that data movement alone makes of them."""
    constant = set(analysis.graph.initializers.values())
    derived = set(constant)
    for info in analysis.nodes:
        inputs = [value for value in info.node.inputs if value is not None]
        if inputs and constant.issuperset(inputs):
            constant.update(info.node.outputs)
            derived.update(info.node.outputs)
        elif keeps_weights(info.node) and info.node.inputs[0] in derived:
            derived.update(info.node.outputs)
    return derived
