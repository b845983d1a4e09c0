"""What padding holds: zeros in stored weights, and in computed values whatever comes of those.

A contraction over padding is right if one operand is zero there and no operand is infinite or not a number, as zero
times those is not zero. Contents are tracked for each padded leaf apart, at places where nothing else is padding.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping

from furiosa_llm.builder.analysis import NodeInfo
from furiosa_llm.builder.factors import Factor


class Content(enum.IntEnum):
    """What a value holds where one leaf is padded; the greater, the less is known."""

    ZERO = 0
    FINITE = 1
    """Numbers, if the values that are not padding are numbers."""
    ANY = 2


Contents = Mapping[Factor, Content]
"""Padded leaf -> what is there. Leaves that are not padded, or that a value has not, are absent."""


def output_content(info: NodeInfo, inputs: Mapping[int, Contents], leaf: Factor, *, zero: bool) -> Content:
    """What an output holds where `leaf` is padded, given the contents of all inputs by number.

    `zero` says that every element of the output is zero.
    """
    rule = info.rule
    if zero:
        return Content.ZERO
    if rule.divisor is not None and leaf in inputs.get(rule.divisor, {}):
        return Content.ANY
    data = [port for port in _data_ports(info) if port in inputs]
    found = [inputs[port][leaf] for port in data if leaf in inputs[port]]
    worst = max(found, default=Content.FINITE)
    match rule.padding:
        case "moves":
            return worst
        case "product" if worst < Content.ANY and _adds_nothing(info, inputs, leaf):
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


def _adds_nothing(info: NodeInfo, inputs: Mapping[int, Contents], leaf: Factor) -> bool:
    """Whether what is added after a contraction is zero, too."""
    added = [port for port in info.rule.masked if port < len(info.node.inputs) and info.node.inputs[port] is not None]
    return all(inputs.get(port, {}).get(leaf) is Content.ZERO for port in added)
