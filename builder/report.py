"""What a build did, for people (the closing table) and for programs (`plan` in the manifest)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from furiosa_llm.builder.analysis import Analysis
from furiosa_llm.builder.planner import Plan


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """How one group of factors is split."""

    size: int
    count: int
    """How many factors (usually one per layer) play this part."""
    axes: tuple[int, ...]
    parts: int
    padded_size: int
    where: str
    """The weights that the factors occur in."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BuildReport:
    """The result of a build. Bytes are of one rank and one decoded token unless said otherwise."""

    artifact: str
    """Path of the folder that was written."""
    tensor_parallel_size: int
    weight_nbytes: int
    """What each rank reads."""
    replicated_nbytes: int
    """Of those, what every rank has alike."""
    padding_nbytes: int
    """Of all ranks together: zeros that are stored for padding."""
    model_nbytes: int
    """The original model's initializers."""
    stored_nbytes: int
    """The weights files."""
    state_nbytes_per_token: int
    """KV cache, per rank and position."""
    collectives: Mapping[str, int]
    collective_nbytes: int
    """Payload that one rank receives for a decoded token."""
    decisions: tuple[Decision, ...]
    replicated: tuple[str, ...]
    """Weights that are on every rank, largest first, and why."""
    notes: tuple[str, ...]
    """Ops that were replicated for want of a better rule."""
    num_nodes: int
    seconds: float
    peak_rss_nbytes: int


def decisions(plan: Plan) -> tuple[Decision, ...]:
    """The plan's choices, largest group first."""
    found = []
    for group, axes in plan.choices.items():
        parts = plan.mesh.parts(axes)
        found.append(
            Decision(
                size=group.size,
                count=len(group.leaves),
                axes=axes,
                parts=parts,
                padded_size=-(-group.size // parts) * parts,
                where=group.description,
            )
        )
    return tuple(found)


def notes(analysis: Analysis) -> tuple[str, ...]:
    """Each reason why an op was replicated, with the number of nodes."""
    counts: dict[str, int] = {}
    for info in analysis.nodes:
        if info.rule.note is not None:
            counts[info.rule.note] = counts.get(info.rule.note, 0) + 1
    return tuple(f"{note} ({count} nodes)" for note, count in counts.items())


def plan_json(plan: Plan, report_notes: tuple[str, ...]) -> dict[str, Any]:
    """The manifest's `plan`: what was split, at what price, and what was not taken."""
    return {
        "choices": [dataclasses.asdict(d) for d in decisions(plan)],
        "price": {"nbytes": plan.price.nbytes, "collectives": plan.price.collectives},
        "unsplit_price": {"nbytes": plan.unsplit.nbytes, "collectives": plan.unsplit.collectives},
        "refused": [
            {"size": r.group.size, "where": r.group.description, "axes": list(r.axes), "reason": r.reason}
            for r in plan.refused
        ],
        "notes": list(report_notes),
    }
