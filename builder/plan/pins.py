"""What tactics pin: the leaves that they select, and into how many parts each must be split."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Sequence

import onnx_ir as ir

from furiosa_llm.builder.errors import PlanError
from furiosa_llm.builder.factors.analysis import Analysis, find_weight_derived
from furiosa_llm.builder.factors.factor import Factor
from furiosa_llm.builder.factors.states import States
from furiosa_llm.builder.plan.groups import LeafGroup, candidates, group_leaves
from furiosa_llm.builder.plan.search import Pin
from furiosa_llm.builder.plan.tactics import Tactic, Tactics
from furiosa_llm.builder.rewrite.control_flow import ORIGINAL_NAME

_ALIASES = {"attention heads": ("key/value heads", "heads"), "ffn": ("feed-forward",)}


def pins_of(tactics: Tactics, analysis: Analysis, states: States) -> dict[Factor, Pin]:
    """Which leaves `tactics` pin; PlanError if one matches nothing, or two contradict each other."""
    pins: dict[Factor, Pin] = {}
    groups = group_leaves(analysis, states, candidates(analysis, states))
    for tactic in tactics.tactics:
        found = _matches(tactic, analysis, groups)
        if not found:
            raise PlanError(_nothing_found(tactic, analysis, groups))
        for leaf in found:
            add_pin(pins, leaf, Pin(parts=tactic.parts, origin=tactic.origin))
    return pins


def add_pin(pins: dict[Factor, Pin], leaf: Factor, pin: Pin) -> None:
    """Add a pin; PlanError if it contradicts an earlier one."""
    before = pins.setdefault(leaf, pin)
    if before.parts != pin.parts:
        said, says = (_spelled(p.parts) for p in (before, pin))
        raise PlanError(
            f"{before.origin} says {said} for a dimension of {leaf.size}, {pin.origin} says {says} for the same one "
            "(dimensions that run over the same indices are split alike); change one of them."
        )


def _spelled(parts: int | None) -> str:
    return "shard" if parts is None else "replicate" if parts == 1 else f"{parts} parts"


# -- what a tactic selects -----------------------------------------------------------------------------------------


def _matches(tactic: Tactic, analysis: Analysis, groups: Sequence[LeafGroup]) -> list[Factor]:
    if tactic.selector == "role":
        roles = _ALIASES.get(tactic.pattern, (tactic.pattern,))
        return [leaf for group in groups if group.role in roles for leaf in _of_layers(group, tactic.layers)]
    wanted = {leaf for group in groups for leaf in group.leaves}
    found = dict.fromkeys(
        leaf
        for value in _weights(tactic, analysis)
        for d, factor in enumerate(analysis.dims[value])
        if tactic.dim is None or d == tactic.dim % len(analysis.dims[value])
        for leaf in factor.leaves()
        if leaf in wanted
    )
    if tactic.parts != 1 and len(found) > 1 and tactic.dim is None:
        raise PlanError(
            f"{tactic.origin} splits weights that have {len(found)} dimensions that can be split; "
            "say which one with `dim = 0` or `dim = 1`."
        )
    return list(found)


def _of_layers(group: LeafGroup, layers: tuple[int, ...] | None) -> Iterator[Factor]:
    count = len(group.leaves)
    for position, leaf in enumerate(group.leaves):
        if layers is None or position in layers or position - count in layers:
            yield leaf


def _weights(tactic: Tactic, analysis: Analysis) -> list[ir.Value]:
    weights = find_weight_derived(analysis)
    if tactic.selector == "weight":
        return [v for v in weights if v.is_initializer() and _fits(_names_of(v), tactic.pattern)]
    nodes = (info.node for info in analysis.nodes if _fits({str(info.node.name)}, tactic.pattern))
    return [v for node in nodes for v in node.inputs if v in weights]


def _names_of(value: ir.Value) -> set[str]:
    """The names that a value has in the normalised and in the source model."""
    return {str(value.name), str(value.meta.get(ORIGINAL_NAME, value.name))}


def _fits(names: Iterable[str], pattern: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)


def _nothing_found(tactic: Tactic, analysis: Analysis, groups: Sequence[LeafGroup]) -> str:
    if tactic.selector == "role":
        known = ", ".join(sorted(f'"{role}" ({n} layers)' for role, n in _layer_counts(groups).items()))
        return f'{tactic.origin} speaks of role "{tactic.pattern}", which nothing has; this model has {known}.'
    named = sorted(name for info in analysis.nodes for name in _known_names(tactic, info.node) if name)
    shown = ", ".join(named[:3])
    return (
        f'{tactic.origin} speaks of {tactic.selector} "{tactic.pattern}", which matches nothing that can be split; '
        f"this model has names such as {shown}."
    )


def _known_names(tactic: Tactic, node: ir.Node) -> set[str]:
    if tactic.selector == "node":
        return {str(node.name)}
    return {str(v.name) for v in node.inputs if v is not None and v.is_initializer()}


def _layer_counts(groups: Sequence[LeafGroup]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for group in groups:
        counts[group.role] = max(counts.get(group.role, 0), len(group.leaves))
    return counts
