"""What padding holds: zeros in stored weights, and in computed values whatever the ops make of these.

A contraction over padding is right if one operand is zero there and no operand is infinite or NaN, because zero times
these is not zero.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection

from furiosa_llm.builder.rules.rule import Rule


class Content(enum.IntEnum):
    """What a value holds at one place of padding; the greater the number, the less is known."""

    ZERO = 0
    FINITE = 1
    """Numbers, if the values that are not padding are numbers."""
    ANY = 2


def content_after(rule: Rule, ports: Collection[int], content_at: Callable[[int], Content | None]) -> Content:
    """What an output holds at a place of padding.

    `ports` are the inputs that are present; `content_at(port)` is what an input holds at the place, None if nothing is
    padding there.
    """
    if rule.divisor is not None and rule.divisor in ports and content_at(rule.divisor) is not None:
        return Content.ANY
    data = [port for port in ports if rule.padding_ports is None or port in rule.padding_ports]
    found = [content for port in data if (content := content_at(port)) is not None]
    worst = max(found, default=Content.FINITE)
    match rule.padding:
        case "moves":
            return worst
        case "product" if worst < Content.ANY and _adds_nothing(rule, ports, content_at):
            return min(found, default=Content.FINITE)
        case "sum" if len(found) == len(data):
            return worst
        case "product" | "sum" | "finite":
            return max(worst, Content.FINITE)
        case "fragile" if worst is Content.ZERO:
            return Content.ZERO
        case _:
            return Content.ANY


def _adds_nothing(rule: Rule, ports: Collection[int], content_at: Callable[[int], Content | None]) -> bool:
    """Whether what is added after a contraction is zero, too."""
    return all(content_at(port) is Content.ZERO for port in rule.masked if port in ports)
