"""Where the program may be cut into pipeline stages: between two layers, where little crosses."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import onnx_ir as ir

from furiosa_llm.builder.lower.build import Build
from furiosa_llm.builder.rules.elementwise import CUT
from furiosa_llm.runtime.artifact.graphs import COLLECTIVE_DOMAIN

MAX_CROSSING = 2
"""Two values may cross: the residual stream, and the value that is still to be added to it.

Where inputs are used as weights, what an adapter adds to that value is a third.
"""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BlockSpan:
    """A run of nodes of the program."""

    first_node: int
    collectives: int
    weight_nbytes: int
    crossing: tuple[str, ...]


def levels(nodes: Sequence[ir.Node]) -> dict[ir.Value, int]:
    """For every value the number of collectives on the longest path to it; -1 if it follows from initializers alone."""
    level: dict[ir.Value, int] = {}
    for node in nodes:
        present = [v for v in node.inputs if v is not None]
        own = max((-1 if v.is_initializer() else level.get(v, 0) for v in present), default=-1)
        if node.domain == COLLECTIVE_DOMAIN:
            own = max(own, 0) + 1
        level.update(dict.fromkeys(node.outputs, own))
    return level


def find_blocks(build: Build) -> list[BlockSpan]:
    """Cut the program after collectives, at most once between two uses of different layers' states."""
    nodes, tensors = list(build.lowered.graph), build.lowered.tensors
    states = [str(pair.input.name) for pair in build.states.pairs]
    most = MAX_CROSSING + any(node.meta.get(CUT) for node in build.model.graph)
    level = levels(nodes)
    crossing = _crossings(nodes, level)
    used = _states_used(nodes, states, level)
    last: dict[int, int] = {}
    for cut, values in crossing.items():
        if len(values) <= most and (not states or 0 < used[cut] < len(states)):
            last[used[cut] if states else cut] = cut
    starts = [0, *sorted(last.values())]
    spans: list[BlockSpan] = []
    seen: set[str] = set()
    for start, stop in zip(starts, [*starts[1:], len(nodes)], strict=True):
        part = nodes[start:stop]
        weights = {str(v.name) for n in part for v in n.inputs if v is not None and str(v.name) in tensors} - seen
        seen |= weights
        spans.append(
            BlockSpan(
                first_node=start,
                collectives=sum(n.domain == COLLECTIVE_DOMAIN for n in part),
                weight_nbytes=sum(tensors[w].local_nbytes for w in weights),
                crossing=tuple(crossing[start]) if start else (),
            )
        )
    return spans


def _crossings(nodes: Sequence[ir.Node], level: Mapping[ir.Value, int]) -> dict[int, list[str]]:
    """For every place after a collective the values that cross it, except values that follow from inputs alone."""
    last_use = {v: i for i, node in enumerate(nodes) for v in node.inputs if v is not None}
    alive: dict[ir.Value, int] = {}
    found: dict[int, list[str]] = {}
    for i, node in enumerate(nodes):
        alive.update({v: last_use[v] for v in node.outputs if v in last_use and level[v] > 0})
        alive = {v: until for v, until in alive.items() if until > i}
        if node.domain == COLLECTIVE_DOMAIN and i + 1 < len(nodes):
            found[i + 1] = [str(v.name) for v in alive]
    return found


def _states_used(nodes: Sequence[ir.Node], states: Sequence[str], level: Mapping[ir.Value, int]) -> list[int]:
    """For every place the number of states used before it: combined with a collective's result, or read by one.

    What follows from states and other inputs alone (a window of the past) can be computed again where it is read.
    """
    behind = {state: frozenset((state,)) for state in states}
    seen, counts = set[str](), [0]
    for node in nodes:
        if node.op_type != "Shape":
            found = frozenset[str]().union(
                *(behind.get(str(v.name), frozenset()) for v in node.inputs if v is not None)
            )
            if any(level[value] > 0 for value in node.outputs):
                seen |= found
            else:
                behind.update({str(value.name): found for value in node.outputs})
        counts.append(len(seen))
    return counts
