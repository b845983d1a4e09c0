"""What each input and output of a model is taken for, and what that was inferred from, for people to read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from furiosa_llm.builder.lower.build import Build
from furiosa_llm.builder.lower.program_shapes import global_shapes


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class InterfaceValue:
    """One input or output."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    role: str
    why: str
    tie: bool = False
    """Whether its name broke a tie."""


def interface_of(build: Build) -> tuple[InterfaceValue, ...]:
    """Every input, then every output."""
    return (*_inputs(build), *_outputs(build))


def _inputs(build: Build) -> Iterator[InterfaceValue]:
    pairs = {pair.input: pair for pair in build.states.pairs}
    roles = build.roles
    for (value, role), shape in zip(roles.items(), global_shapes(build, list(roles)), strict=True):
        pair = pairs.get(value)
        why = role.why if pair is None or role.name == "state" else "an output of its size is computed of it"
        if pair is not None and pair.named:
            why = "as many outputs have its size, in the order of numbers in their names or of their own"
        yield InterfaceValue(
            name=str(value.name),
            dtype=build.probes.facts[value].dtype.name,
            shape=shape,
            role="state" if value in build.states.values else role.name,
            why=why if pair is None else f"{why}; comes out as {pair.output.name} ({pair.mode})",
            tie=role.tie or (pair is not None and pair.named),
        )


def _outputs(build: Build) -> Iterator[InterfaceValue]:
    made = {pair.output: pair for pair in build.states.pairs}
    values = build.model.graph.outputs
    for value, shape in zip(values, global_shapes(build, values), strict=True):
        role, why = "other", "nothing tells what it is for"
        if value is build.logits:
            role, why = "logits", "it ends in a product as wide as the vocabulary"
        elif value in made:
            role, why = "state", f"it becomes {made[value].input.name} in the next step"
        elif value in build.states.values:
            role, why = "state", "its name; no input takes it"
        yield InterfaceValue(
            name=str(value.name),
            dtype=build.probes.facts[value].dtype.name,
            shape=shape,
            role=role,
            why=why,
        )
