"""A tactics file: choices that a person takes from the planner, in TOML.

    [[tactic]]
    role = "feed-forward"     # as `furiosa-llm plan` names it; or weight = "lm_head*", or node = "/lm_head/*"
    layers = [-1]             # with role: of its layers, counted from 0, or from -1 at the end
    place = "replicate"       # "replicate", "shard" (the planner chooses how far), or a number of parts

`weight` and `node` are patterns (* and ?) of names in the source model; `dim` picks one dimension of the weights.
"""

from __future__ import annotations

import dataclasses
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from furiosa_llm.builder.errors import PlanError

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
