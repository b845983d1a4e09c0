"""The placements of a node's outputs, by the rule of its op applied to the node of the unsplit model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from furiosa_llm.builder.errors import BuildError
from furiosa_llm.builder.proof import pieces
from furiosa_llm.builder.proof.binding import (
    Attributes,
    bind,
    compose,
    global_sizes,
    resolve_copies,
    unsplit_attributes,
    uses,
)
from furiosa_llm.builder.proof.contents import check_contraction, check_positions, contents_of
from furiosa_llm.builder.proof.interpretation import LocalFacts, global_fact
from furiosa_llm.builder.proof.pieces import ONE, Copies, Dim
from furiosa_llm.builder.proof.placement import REBUILD, ContradictionError, Held, Placement, RankFunction, Rows
from furiosa_llm.builder.rules import NodeView, op_of, rule_of
from furiosa_llm.builder.rules.rule import Operand, Rule, Signature, parse
from furiosa_llm.builder.shapes.interpreter import Facts
from furiosa_llm.runtime.artifact.layout import Mesh

_TOLD_SIZES = {"Resize": 3}
"""Op type -> the operand that gives the sizes of an output, for ops that `Movers` does not handle."""


class RuleTransfer:
    """Applies rules."""

    def __init__(self, facts: LocalFacts, mesh: Mesh, opset: int) -> None:
        self._facts = facts
        self._mesh = mesh
        self._opset = opset

    def outputs(self, node: ir.Node, held: Sequence[Held | None]) -> list[Held]:
        """The outputs' placements; ContradictionError if no unsplit node explains them."""
        inputs = self._tensors(node, held)
        first: ContradictionError | None = None
        for attributes in self._unsplit_attributes(node, inputs):
            try:
                return self._explained(node, held, inputs, attributes)
            except ContradictionError as error:
                first = first or error
        assert first is not None
        raise first

    def _explained(
        self, node: ir.Node, held: Sequence[Held | None], inputs: Mapping[int, Placement], attributes: Attributes
    ) -> list[Held]:
        """The outputs' placements if the unsplit node has those `attributes`."""
        whole = _with_attributes(node, attributes)
        try:
            view = self._global_view(whole, inputs)
            rule, other = self._rule(view), self._rule(view.swapped())
            shapes = [tuple(zip(view.facts[v].shape, view.others[v].shape, strict=True)) for v in whole.outputs]
        finally:
            if whole is not node:
                _detach(whole)
        signature = parse(rule.text)
        given = {name: (size, other.sizes.get(name, size)) for name, size in rule.sizes.items()}
        sizes = global_sizes(signature, inputs, shapes, given)
        symbols, unlinked = bind(signature, inputs, sizes, self._mesh)
        _check_whole(signature, inputs, symbols, unlinked)
        for name, text in rule.attributes.items():
            _check_attribute(node, name, text, {s: pieces.run(size) for s, size in sizes.items()} | symbols)
        contracted = [symbols[s] for s in sorted(signature.reduce) if s in symbols and s not in unlinked]
        reduced = _reduced(contracted)
        partial = _partial(node, rule, inputs, reduced, self._facts)
        check_contraction(rule, inputs, contracted)
        check_positions(node, rule, inputs, self._facts)
        scale = self._mesh.parts(sorted(reduced)) if rule.average else 1
        found: list[Placement] = []
        for port, value in enumerate(node.outputs):
            operand = signature.outputs[port] if port < len(signature.outputs) else None
            dims = _still_copied(
                node, operand, compose(operand, shapes[port], symbols, unlinked | signature.full), inputs
            )
            self._check_local(value, dims)
            check_axes(dims, partial)
            contents = contents_of(rule, inputs, dims, zero=self._facts.is_zero(value))
            found.append(Placement(dims=dims, partial=partial, scale=scale, contents=contents))
        table = next((symbols[s] for s in signature.lookup if pieces.axes_of(symbols[s])), None)
        return list(found) if table is None else [_rows(node, rule, held, one, table, inputs) for one in found]

    # -- operands ------------------------------------------------------------------------------------------------

    def _tensors(self, node: ir.Node, held: Sequence[Held | None]) -> dict[int, Placement]:
        """The inputs as tensors of the unsplit model."""
        found: dict[int, Placement] = {}
        for port, (value, one) in enumerate(zip(node.inputs, held, strict=True)):
            if value is None or one is None:
                continue
            match one:
                case Placement():
                    if one.scale != 1:
                        raise ContradictionError(
                            f"a mean of parts, {value.name!r}, that is not divided by their number",
                            f"a product with 1/{one.scale} first",
                            REBUILD,
                        )
                    found[port] = one
                case RankFunction() if port == 1 and node.op_type.startswith("Gather"):
                    found[port] = Placement(dims=one.dims)
                case _:
                    raise ContradictionError(
                        f"an operand that differs between ranks, {value.name!r}: {one}",
                        "a tensor that is split, partial or the same on all ranks",
                        REBUILD,
                    )
        if len(found) == 1 or not any(pieces.has_copies(dim) for one in found.values() for dim in one.dims):
            return found
        return resolve_copies(node, parse(self._local_rule(node).text), found)

    def _local_rule(self, node: ir.Node) -> Rule:
        """The rule of the node as a rank has it."""
        return self._rule(NodeView(node, self._facts.first, self._facts.second, self._opset))

    def _rule(self, view: NodeView) -> Rule:
        try:
            return rule_of(view)
        except (AssertionError, BuildError) as error:
            raise ContradictionError(
                f"a node that the rule of its op does not fit ({type(error).__name__}: {error})",
                "attributes and operands that fit each other",
                REBUILD,
            ) from error

    def _global_view(self, node: ir.Node, inputs: Mapping[int, Placement]) -> NodeView:
        """The node as the unsplit model has it."""
        both: list[Facts] = []
        for side, facts in enumerate((self._facts.first, self._facts.second)):
            known: Facts = {}
            for port, value in enumerate(node.inputs):
                if value is not None:
                    shape = tuple(pieces.global_size(dim)[side] for dim in inputs[port].dims)
                    known[value] = global_fact(facts[value], shape)
            _restore_sizes(node, facts, known)
            both.append(known)
        operands = tuple([None if v is None else known[v] for v in node.inputs] for known in both)
        try:
            results = self._facts.infer_global(node, (operands[0], operands[1]))
        except BuildError as error:
            raise ContradictionError(
                f"operands that do not fit each other in the unsplit model ({error})",
                "operands that are split alike",
                REBUILD,
            ) from error
        for known, result in zip(both, results, strict=True):
            known.update(zip(node.outputs, result, strict=True))
        return NodeView(node, both[0], both[1], self._opset)

    def _unsplit_attributes(self, node: ir.Node, inputs: Mapping[int, Placement]) -> list[Attributes]:
        """Attributes that are sizes, as the unsplit model may have them."""
        if not any(pieces.axes_of(dim) for placement in inputs.values() for dim in placement.dims):
            return [{}]
        rule = self._local_rule(node)
        return unsplit_attributes(rule, parse(rule.text), inputs) if rule.attributes else [{}]

    # -- results -------------------------------------------------------------------------------------------------

    def _check_local(self, value: ir.Value, dims: tuple[Dim, ...]) -> None:
        found = self._facts.shape(value)
        expected = tuple(pieces.local_size(dim) for dim in dims)
        if found != expected:
            raise ContradictionError(
                f"an output {value.name!r} of local shape {[s[0] for s in found]}",
                f"{[s[0] for s in expected]}, as its operands are split",
                REBUILD,
            )


def check_axes(dims: Sequence[Dim], partial: Collection[int]) -> None:
    """Check that no mesh axis is used twice in one tensor: the ranks would hold a diagonal of it."""
    seen = list(partial)
    for dim in dims:
        for axis in pieces.axes_of(dim):
            if axis in seen:
                raise ContradictionError(f"a tensor that is split twice over mesh axis {axis}", "once", REBUILD)
            seen.append(axis)


def check_linear(node: ir.Node, ports: Sequence[int], inputs: Mapping[int, Placement], facts: LocalFacts) -> None:
    """Check that what is added to a partial sum is a partial sum over the same axes, or zero."""
    every = {port: one.partial for port, one in inputs.items() if one.partial}
    wanted = next(iter(every.values()), frozenset())
    for port, one in inputs.items():
        value = node.inputs[port]
        assert value is not None
        if port in ports and one.partial != wanted and not facts.is_zero(value):
            raise ContradictionError(
                f"operands {value.name!r} and others that are partial over different axes: {sorted(one.partial)} and "
                f"{sorted(wanted)}",
                "partial sums over the same axes, what is whole counted on one rank alone",
                REBUILD,
            )


def _partial(
    node: ir.Node, rule: Rule, inputs: Mapping[int, Placement], reduced: frozenset[int], facts: LocalFacts
) -> frozenset[int]:
    """The axes over which the outputs are partial sums."""
    if rule.ignores_values:
        return frozenset()
    for port in rule.masked:
        value = node.inputs[port] if port in inputs else None
        if value is not None and inputs[port].partial != reduced and not facts.is_zero(value):
            raise ContradictionError(
                f"a bias {value.name!r} that is added once for axes {sorted(inputs[port].partial)}",
                f"once for the axes {sorted(reduced)} that the contraction is split over",
                REBUILD,
            )
    plain = {port: one for port, one in inputs.items() if port not in rule.masked}
    ports = [port for port, one in plain.items() if one.partial]
    passing = tuple(plain) if rule.bilinear and len(ports) == 1 else rule.linear
    for port in ports:
        if port not in passing:
            raise ContradictionError(
                f"a partial sum {_name(node, port)!r} over axes {sorted(plain[port].partial)} in an op that is not "
                "linear in it",
                "an AllReduce in front of it",
                REBUILD,
            )
    if not rule.bilinear:
        check_linear(node, rule.linear, plain, facts)
    incoming = frozenset(axis for port in ports for axis in plain[port].partial)
    if incoming & reduced:
        raise ContradictionError("a partial sum that is contracted over its own axes", "other axes", REBUILD)
    return incoming | reduced


def _name(node: ir.Node, port: int) -> str:
    value = node.inputs[port]
    return str(value.name) if value is not None else ""


def _still_copied(
    node: ir.Node, operand: Operand, dims: tuple[Dim, ...], inputs: Mapping[int, Placement]
) -> tuple[Dim, ...]:
    """The dimensions of an output, where one index that stands for any number of equal ones still does."""
    entry = op_of(node)
    found = list(dims)
    for back in range(1 + (0 if entry is None else entry.core_dims), len(dims) + 1):
        copied = any(one.dims[-back] == (Copies(ONE),) for one in inputs.values() if len(one.dims) >= back)
        if copied and operand is not None and operand[-back].kind == "one":
            found[-back] = (Copies(ONE),)
    return tuple(found)


def _reduced(contracted: Sequence[Dim]) -> frozenset[int]:
    """The axes over which a contraction is split; every segment of a concatenation must agree on them."""
    for dim in contracted:
        for piece in dim:
            if isinstance(piece, pieces.Cat) and len({frozenset(pieces.axes_of(part)) for part in piece.parts}) > 1:
                raise ContradictionError(
                    "a contraction of a concatenation whose segments are split differently", "one split", REBUILD
                )
            if isinstance(piece, pieces.Gathered):
                raise ContradictionError("a contraction of gathered parts out of order", "their order first", REBUILD)
    return frozenset(axis for dim in contracted for axis in pieces.axes_of(dim))


def _check_whole(
    signature: Signature, inputs: Mapping[int, Placement], symbols: Mapping[str, Dim], unlinked: frozenset[str]
) -> None:
    """Check that dimensions which the op needs whole are whole."""
    whole = signature.full | signature.pin
    for port, d, dim, expression in uses(signature, inputs):
        needed = expression.kind in ("full", "one") or expression.symbols & unlinked
        bad = dim if needed and not pieces.is_whole(dim) else None
        for symbol in expression.symbols & whole:
            if symbol in symbols and not pieces.is_whole(symbols[symbol]):
                bad = symbols[symbol]
        if bad is not None:
            raise ContradictionError(
                f"an operand {port} that is split in dimension {d} ({pieces.text(bad)}), which the op needs whole",
                "an AllGather in front of it",
                REBUILD,
            )


def _check_attribute(node: ir.Node, name: str, text: str, symbols: Mapping[str, Dim]) -> None:
    """Check that an attribute that is a size, or a list of sizes, is what a rank needs."""
    expected = [math.prod(pieces.local_size(symbols[s])[0] for s in product.split()) for product in text.split(",")]
    attribute = node.attributes.get(name)
    found = [] if attribute is None else np.atleast_1d(attribute.value).tolist()
    if found != expected:
        raise ContradictionError(f"the attribute {name} {found}", f"{expected}, the sizes on a rank", REBUILD)


def _restore_sizes(node: ir.Node, local: Facts, known: Facts) -> None:
    """Restore the unsplit model's sizes in an operand of sizes: where it keeps a rank's size, it keeps the model's."""
    port = _TOLD_SIZES.get(node.op_type, len(node.inputs)) if not node.domain else len(node.inputs)
    data, target = node.inputs[0] if node.inputs else None, node.inputs[port] if port < len(node.inputs) else None
    sizes = known[target].value if target is not None else None
    if data is None or target is None or sizes is None or sizes.shape != (len(local[data].shape),):
        return
    pairs = zip(sizes, local[data].shape, known[data].shape, strict=True)
    kept = [unsplit if size == own else size for size, own, unsplit in pairs]
    known[target] = dataclasses.replace(known[target], value=np.array(kept, dtype=sizes.dtype))


def _with_attributes(node: ir.Node, attributes: Attributes) -> ir.Node:
    """The node as the unsplit model may have it; the node itself if there is nothing to change."""
    if not attributes:
        return node
    changed = dict(node.attributes)
    for name, value in attributes.items():
        changed[name] = ir.AttrInt64s(name, value) if isinstance(value, list) else ir.AttrInt64(name, value)
    outputs = [ir.Value(name=value.name) for value in node.outputs]
    return ir.Node(node.domain, node.op_type, node.inputs, changed, outputs=outputs)


def _rows(
    node: ir.Node,
    rule: Rule,
    held: Sequence[Held | None],
    out: Placement,
    table: Dim,
    inputs: Mapping[int, Placement],
) -> Rows:
    indices = node.inputs[1]
    if not isinstance(held[1], RankFunction) or indices is None:
        raise ContradictionError(
            "a split table that is looked up at global positions", "positions in the rank's own part", REBUILD
        )
    if any(one.partial for one in inputs.values()):
        raise ContradictionError("a split table that is a partial sum", "an AllReduce first", REBUILD)
    trailing = len(inputs[0].dims) - (rule.axis or 0) - 1
    return Rows(dims=out.dims, table=table, indices=indices, trailing=trailing, contents=out.contents)


def _detach(node: ir.Node) -> None:
    """Remove a node that exists only for the proof from its operands' lists of uses."""
    for port in range(len(node.inputs)):
        node.replace_input_with(port, None)
