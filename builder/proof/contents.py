"""What padding holds after a node, and whether the node may meet the padding of its operands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from furiosa_llm.builder.proof import pieces
from furiosa_llm.builder.proof.interpretation import LocalFacts
from furiosa_llm.builder.proof.pieces import Dim
from furiosa_llm.builder.proof.placement import REBUILD, Axes, Content, ContradictionError, Placement
from furiosa_llm.builder.rule import Rule

Contents = Mapping[Axes, Content]


def content_of(placement: Placement, axes: Axes) -> Content | None:
    """What the padding of the piece over `axes` holds; None if the tensor has no such piece."""
    if not any(axes in pieces.padded_axes(dim) for dim in placement.dims):
        return None
    return placement.contents.get(axes, Content.ANY)


def check_contraction(
    rule: Rule, inputs: Mapping[int, Placement], contracted: Sequence[Dim], short: Sequence[Dim]
) -> None:
    """Padding may be contracted where one operand has zeros there, and no operand what times zero is not zero.

    In a dimension of `short`, whose last block is filled in part, that operand must be one that has the elements
    themselves: those that have blocks hold zeros in whole blocks only.
    """
    for axes in dict.fromkeys(a for dim in short if dim in contracted for a in pieces.padded_axes(dim)):
        elements = [one for one in inputs.values() if any(dim in short for dim in one.dims)]
        if all(content_of(one, axes) is not Content.ZERO for one in elements):
            raise ContradictionError(
                "a contraction of blocks, the last one filled in part, with an operand that nobody says is zero there",
                "a Where that clears it first",
                REBUILD,
            )
    for axes in dict.fromkeys(a for dim in contracted for a in pieces.padded_axes(dim)):
        found = {port: c for port, one in inputs.items() if (c := content_of(one, axes)) is not None}
        if rule.average:
            raise ContradictionError("a mean over padding", "a dimension without padding", REBUILD)
        if Content.ZERO not in found.values():
            raise ContradictionError(
                "a contraction of padding that nobody says is zero", "zeros in one operand", REBUILD
            )
        if Content.ANY in found.values():
            raise ContradictionError(
                "a contraction of padding that may hold anything, even infinity",
                "a Where that clears it first",
                REBUILD,
            )


def check_positions(node: ir.Node, rule: Rule, inputs: Mapping[int, Placement], facts: LocalFacts) -> None:
    """Padding must be neither a position nor an integer divisor."""
    integers = facts.first[node.outputs[0]].dtype.is_integer()
    for port in (rule.indices, rule.divisor if integers else None):
        one = inputs.get(port) if port is not None else None
        if one is None:
            continue
        for axes in (a for dim in one.dims for a in pieces.padded_axes(dim)):
            if port == rule.divisor or content_of(one, axes) is not Content.ZERO:
                raise ContradictionError("positions or divisors in padding", "a tensor without padding there", REBUILD)


def contents_of(rule: Rule, inputs: Mapping[int, Placement], dims: Sequence[Dim], *, zero: bool) -> dict[Axes, Content]:
    """What the padding of an output holds."""
    wanted = dict.fromkeys(axes for dim in dims for axes in pieces.padded_axes(dim))
    return {axes: Content.ZERO if zero else _content(rule, inputs, axes) for axes in wanted}


def _content(rule: Rule, inputs: Mapping[int, Placement], axes: Axes) -> Content:
    if rule.divisor is not None and rule.divisor in inputs and content_of(inputs[rule.divisor], axes) is not None:
        return Content.ANY
    ports = [p for p in inputs if rule.padding_ports is None or p in rule.padding_ports]
    found = [c for p in ports if (c := content_of(inputs[p], axes)) is not None]
    worst = max(found, default=Content.FINITE)
    match rule.padding:
        case "moves":
            return worst
        case "product" if worst < Content.ANY and _adds_nothing(rule, inputs, axes):
            return min(found, default=Content.FINITE)
        case "sum" if len(found) == len(ports):
            return worst
        case "product" | "sum" | "finite":
            return max(worst, Content.FINITE)
        case "fragile" if worst is Content.ZERO:
            return Content.ZERO
        case _:
            return Content.ANY


def _adds_nothing(rule: Rule, inputs: Mapping[int, Placement], axes: Axes) -> bool:
    """Whether what is added after a contraction is zero, too."""
    return all(content_of(inputs[port], axes) is Content.ZERO for port in rule.masked if port in inputs)
