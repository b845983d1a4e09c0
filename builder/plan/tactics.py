"""A tactics file: choices that a person takes from the planner, in TOML.

    [[tactic]]
    role = "feed-forward"     # as `furiosa-llm plan` names it; or weight = "lm_head*", or node = "/lm_head/*"
    layers = [-1]             # with role: of its layers, counted from 0, or from -1 at the end
    place = "replicate"       # "replicate", "shard" (the planner chooses how far), or a number of parts

`weight` and `node` are patterns (* and ?) of names in the source model; `dim` picks one dimension of the weights.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import os
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from furiosa_llm.builder.errors import PlanError
from furiosa_llm.builder.factors.analysis import Analysis, find_weight_derived
from furiosa_llm.builder.factors.factor import Factor
from furiosa_llm.builder.factors.states import States
from furiosa_llm.builder.plan.groups import LeafGroup, candidates, group_leaves
from furiosa_llm.builder.plan.search import Pin
from furiosa_llm.builder.rewrite.control_flow import ORIGINAL_NAME

_ALIASES = {"attention heads": ("key/value heads", "heads"), "ffn": ("feed-forward",)}
_SELECTORS = ("role", "weight", "node")
_KEYS = {*_SELECTORS, "layers", "dim", "place"}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tactic:
    """One choice."""

    selector: str
    """`role`, `weight` or `node`."""
    pattern: str
    parts: int | None
    """How many parts; 1: whole on every rank; None: more than one."""
    layers: tuple[int, ...] | None
    dim: int | None
    origin: str
    """Which tactic of which file, for messages."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tactics:
    """Choices that the planner must keep."""

    tactics: tuple[Tactic, ...]

    def to_json(self) -> list[dict[str, Any]]:
        """Plain values, for the manifest's provenance."""
        return [dataclasses.asdict(tactic) for tactic in self.tactics]

    def pins(self, analysis: Analysis, states: States) -> dict[Factor, Pin]:
        """Which leaves they pin; PlanError if one matches nothing, or two contradict each other."""
        pins: dict[Factor, Pin] = {}
        groups = group_leaves(analysis, states, candidates(analysis, states))
        for tactic in self.tactics:
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


# -- the file ------------------------------------------------------------------------------------------------------


def read_tactics(path: str | os.PathLike[str]) -> Tactics:
    """The tactics in a file; PlanError for anything that is not one."""
    file = Path(path)
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanError(f"{file} cannot be read: {error.strerror}; give the path of a tactics file.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise PlanError(f"{file} is not TOML: {error}; see docs/planning.md for an example.") from error
    entries = document.pop("tactic", None)
    if document or not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        found = ", ".join(sorted(document)) or "nothing of the kind"
        raise PlanError(f"{file} must hold [[tactic]] tables and nothing else, found {found}.")
    return Tactics(tactics=tuple(_tactic(e, f"tactic {n} of {file.name}") for n, e in enumerate(entries, start=1)))


def _tactic(entry: Mapping[str, Any], origin: str) -> Tactic:
    unknown = sorted(entry.keys() - _KEYS)
    selectors = [key for key in _SELECTORS if key in entry]
    if unknown or len(selectors) != 1 or not isinstance(entry[selectors[0]], str):
        found = f"unknown keys {unknown}" if unknown else f"{selectors or 'none'} of them"
        raise PlanError(f"{origin} must have one of role, weight and node, and place; found {found}.")
    selector = selectors[0]
    return Tactic(
        selector=selector,
        pattern=entry[selector],
        parts=_parts(entry.get("place"), origin),
        layers=_layers(entry.get("layers"), selector, origin),
        dim=_dim(entry.get("dim"), selector, origin),
        origin=origin,
    )


def _parts(place: object, origin: str) -> int | None:
    if place == "shard":
        return None
    if place == "replicate":
        return 1
    if isinstance(place, int) and not isinstance(place, bool) and place >= 1:
        return place
    raise PlanError(f'{origin} has place = {place!r}, expected "shard", "replicate" or a number of parts.')


def _layers(layers: object, selector: str, origin: str) -> tuple[int, ...] | None:
    if layers is None:
        return None
    if selector != "role":
        raise PlanError(f"{origin} has layers, which go with role only; a {selector} pattern names its layers itself.")
    if not isinstance(layers, list) or not all(isinstance(n, int) and not isinstance(n, bool) for n in layers):
        raise PlanError(f"{origin} has layers = {layers!r}, expected a list of numbers such as [0, -1].")
    return tuple(layers)


def _dim(dim: object, selector: str, origin: str) -> int | None:
    if dim is None:
        return None
    if selector == "role" or not isinstance(dim, int) or isinstance(dim, bool):
        raise PlanError(f"{origin} has dim = {dim!r}, expected a dimension's number, beside weight or node.")
    return dim
