"""Where padding lies, and what a value holds there.

Contents are tracked for each *place* apart, where nothing else is padding: a padded leaf, or a
prefix below which a leaf is split (what the last block has beyond it is padding even if the leaf is split evenly).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from furiosa_llm.builder.factors.analysis import NodeInfo
from furiosa_llm.builder.factors.factor import Factor, Kind
from furiosa_llm.builder.rules.padding import Content, content_after

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
    return Content.ZERO if zero else content_after(info.rule, inputs, lambda port: content_at(inputs[port], place))
