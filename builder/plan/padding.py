"""Where padding lies, and what a value holds there.

Contents are tracked for each *place* separately, as if nothing else were padding. A place is a padded leaf, or a prefix
below which a leaf is split: what the last block has beyond the prefix is padding even if the leaf is split evenly.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from furiosa_llm.builder.factors.analysis import NodeInfo
from furiosa_llm.builder.factors.factor import Factor, Kind
from furiosa_llm.builder.rules.padding import Content, content_after

Contents = Mapping[Factor, Content]
"""Place (a leaf or a prefix) -> what is there. Places that are not padded, or not in the value, are absent."""


def padded_places(factor: Factor, split: Collection[Factor], uneven: Collection[Factor]) -> Iterator[Factor]:
    """The places of padding in a dimension whose leaves `split` are split, the leaves `uneven` among them unevenly."""
    root = factor.find()
    if root.kind is Kind.LEAF:
        if root in uneven:
            yield root
    elif root.kind is Kind.PREFIX:
        if any(leaf in split for leaf in root.leaves()):
            yield root  # all padding in the prefix lies beyond its end
    else:
        for kid in root.kids:
            yield from padded_places(kid, split, uneven)


def have_common_leaves(place: Factor, other: Factor) -> bool:
    """Whether two places of padding have a leaf in common, so that one split may cause both."""
    return place is other or not set(place.leaves()).isdisjoint(other.leaves())


def content_at(contents: Contents, place: Factor) -> Content | None:
    """What a value holds at one place; None if nothing is padding there.

    Contents known for another place that has leaves in common with it show at best that everything here is finite.
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
    return Content.ZERO if zero else content_after(info.rule, inputs, lambda port: content_at(inputs[port], place))
