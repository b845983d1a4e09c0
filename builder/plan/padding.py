"""What padding holds: zeros in stored weights, and in computed values whatever comes of those.

A contraction over padding is right if one operand is zero there and no operand is infinite or not a number, as zero
times those is not zero. Contents are tracked for each *place* apart, where nothing else is padding: a padded leaf, or a
prefix below which a leaf is split (what the last block has beyond it is padding even if the leaf is split evenly).
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterator, Mapping

from furiosa_llm.builder.factors.analysis import NodeInfo
from furiosa_llm.builder.factors.factor import Factor, Kind


class Content(enum.IntEnum):
    """What a value holds where one leaf is padded; the greater, the less is known."""

    ZERO = 0
    FINITE = 1
    """Numbers, if the values that are not padding are numbers."""
    ANY = 2


Contents = Mapping[Factor, Content]
"""Place (a leaf or a prefix) -> what is there. Places that are not padded, or that a value has not, are absent."""


def padded_places(factor: Factor, split: Collection[Factor], uneven: Collection[Factor]) -> Iterator[Factor]:
    """The places of padding in a dimension of which the leaves `split` are split, of those `uneven` ones unevenly."""
    root = factor.find()
    if root.kind is Kind.LEAF:
        if root in uneven:
            yield root
    elif root.kind is Kind.PREFIX:
        if any(leaf in split for leaf in root.leaves()):
            yield root  # whatever is padding in it is beyond it
    else:
        for kid in root.kids:
            yield from padded_places(kid, split, uneven)


def have_common_leaves(place: Factor, other: Factor) -> bool:
    """Whether two places of padding come of one split."""
    return place is other or not set(place.leaves()).isdisjoint(other.leaves())


def content_at(contents: Contents, place: Factor) -> Content | None:
    """What a value holds at one place; None if nothing is padding there.

    Of a place that has leaves in common with it, but is not the same, it is known at best that all is finite.
    """
    found = [
        content if other is place else max(content, Content.FINITE)
        for other, content in contents.items()
        if have_common_leaves(place, other)
    ]
    return max(found, default=None)


def output_content(info: NodeInfo, inputs: Mapping[int, Contents], place: Factor, *, zero: bool) -> Content:
    """What an output holds at a place of padding, given the contents of all inputs by number.

    `zero` says that every element of the output is zero.
    """
    rule = info.rule
    if zero:
        return Content.ZERO
    if rule.divisor is not None and content_at(inputs.get(rule.divisor, {}), place) is not None:
        return Content.ANY
    data = [port for port in _data_ports(info) if port in inputs]
    found = [content for port in data if (content := content_at(inputs[port], place)) is not None]
    worst = max(found, default=Content.FINITE)
    match rule.padding:
        case "moves":
            return worst
        case "product" if worst < Content.ANY and _adds_nothing(info, inputs, place):
            return min(found, default=Content.FINITE)
        case "sum" if len(found) == len(data):
            return worst
        case "product" | "sum" | "finite":
            return max(worst, Content.FINITE)
        case "fragile" if worst is Content.ZERO:
            return Content.ZERO
        case _:
            return Content.ANY


def _data_ports(info: NodeInfo) -> list[int]:
    ports = range(len(info.node.inputs)) if info.rule.padding_ports is None else info.rule.padding_ports
    return [port for port in ports if port < len(info.node.inputs) and info.node.inputs[port] is not None]


def _adds_nothing(info: NodeInfo, inputs: Mapping[int, Contents], place: Factor) -> bool:
    """Whether what is added after a contraction is zero, too."""
    added = [port for port in info.rule.masked if port < len(info.node.inputs) and info.node.inputs[port] is not None]
    return all(content_at(inputs.get(port, {}), place) is Content.ZERO for port in added)
