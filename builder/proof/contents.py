"""What padding holds after a node, and whether the node may meet the padding of its operands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from furiosa_llm.builder.proof import pieces
from furiosa_llm.builder.proof.interpretation import LocalFacts
from furiosa_llm.builder.proof.pieces import Dim, Place
from furiosa_llm.builder.proof.placement import REBUILD, ContradictionError, Placement
from furiosa_llm.builder.rules.padding import Content, content_after
from furiosa_llm.builder.rules.rule import Rule


def content_of(placement: Placement, place: Place) -> Content | None:
    """What a tensor holds at a place of padding; None if nothing is padding there.

    Contents known for a place that shares an axis but ends elsewhere show at best that everything here is finite: the
    padding of whole blocks says nothing about a block that is filled in part.
    """
    found: list[Content] = []
    for other in (other for dim in placement.dims for other in pieces.places(dim)):
        content = placement.contents.get(other, Content.ANY)
        if other == place:
            found.append(content)
        elif not set(other[0]).isdisjoint(place[0]):
            found.append(max(content, Content.FINITE))
    return max(found, default=None)


def check_contraction(rule: Rule, inputs: Mapping[int, Placement], contracted: Sequence[Dim]) -> None:
    """Check contracted padding: one operand must be zero there, and none infinite or NaN, because 0 * inf is NaN."""
    for place in dict.fromkeys(place for dim in contracted for place in pieces.places(dim)):
        found = {port: c for port, one in inputs.items() if (c := content_of(one, place)) is not None}
        if rule.average:
            raise ContradictionError("a mean over padding", "a dimension without padding", REBUILD)
        if all(content is not Content.ZERO or port in rule.offset for port, content in found.items()):
            raise ContradictionError(
                "a contraction of padding that nobody says is zero",
                "zeros in one operand (a Where that clears it), and nothing that is subtracted from them",
                REBUILD,
            )
        if Content.ANY in found.values():
            raise ContradictionError(
                "a contraction of padding that may hold anything, even infinity",
                "a Where that clears it first",
                REBUILD,
            )


def check_positions(node: ir.Node, rule: Rule, inputs: Mapping[int, Placement], facts: LocalFacts) -> None:
    """Check that padding is neither a position nor an integer divisor."""
    integers = facts.first[node.outputs[0]].dtype.is_integer()
    for port in (rule.indices, rule.divisor if integers else None):
        one = inputs.get(port) if port is not None else None
        if one is None:
            continue
        for place in (place for dim in one.dims for place in pieces.places(dim)):
            if port == rule.divisor or content_of(one, place) is not Content.ZERO:
                raise ContradictionError("positions or divisors in padding", "a tensor without padding there", REBUILD)


def contents_of(
    rule: Rule, inputs: Mapping[int, Placement], dims: Sequence[Dim], *, zero: bool
) -> dict[Place, Content]:
    """What the padding of an output holds, by place."""
    wanted = dict.fromkeys(place for dim in dims for place in pieces.places(dim))
    return {place: Content.ZERO if zero else _content(rule, inputs, place) for place in wanted}


def _content(rule: Rule, inputs: Mapping[int, Placement], place: Place) -> Content:
    return content_after(rule, inputs, lambda port: content_of(inputs[port], place))
