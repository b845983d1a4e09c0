"""Check annotations of neighbouring nodes against each other: placements on both sides of a value, and stages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import onnx

from furiosa_llm.builder.plan.annotations.check_specs import Placed
from furiosa_llm.builder.plan.annotations.device_placement import relation
from furiosa_llm.builder.plan.annotations.finding import Finding, error, warning
from furiosa_llm.builder.plan.annotations.nodes import Annotation, annotations_of, label_of


def check_neighbours(model: onnx.ModelProto, placed: Sequence[Placed]) -> Iterator[Finding]:
    """Compare what the nodes at both ends of each value of the main graph say of it."""
    outer = [entry for entry in placed if not entry.annotation.is_inner]
    produced = {
        (entry.annotation.configuration, entry.tensor): entry
        for entry in outer
        if entry.tensor in entry.annotation.node.output
    }
    first_read: dict[tuple[str, str], Placed] = {}
    constant = {tensor.name for tensor in model.graph.initializer} | {value.name for value in model.graph.input}
    for entry in outer:
        if entry.tensor in entry.annotation.node.output:
            continue
        key = (entry.annotation.configuration, entry.tensor)
        before = produced.get(key)
        if before is not None:
            yield from _check_value(before, entry)
        elif entry.tensor in constant:
            # Nothing else says how the value comes in, so its first reader says it.
            yield from _check_shared(first_read.setdefault(key, entry), entry)
    for configuration in model.configuration:
        yield from _check_stages(model, configuration.name)


def _check_value(before: Placed, after: Placed) -> Iterator[Finding]:
    producer, node = before.annotation.label, after.annotation.label
    found = f"{producer} gives it {before.placement.describe()}, this node takes it {after.placement.describe()}"
    match relation(before.placement, after.placement):
        case "exchange":
            yield error(
                node,
                after.tensor,
                f"{found} with other parts on the devices: neither is a part of the other",
                f"give both nodes the same spec; to exchange parts on purpose, say so in the output spec of {producer}",
            )
        case "elsewhere" if after.annotation.stage is None or after.annotation.stage == before.annotation.stage:
            yield error(
                node,
                after.tensor,
                f"{producer} leaves it on devices {list(before.placement.devices)}, this node takes it from "
                f"{list(after.placement.devices)} in the same pipeline stage",
                "use the same devices on both sides, or put the nodes into different pipeline stages",
            )
        case "gather":
            yield warning(
                node,
                after.tensor,
                f"{found}: the parts are gathered before the node",
                "split it in the node, too, unless the node needs all of it",
            )


def _check_shared(first: Placed, entry: Placed) -> Iterator[Finding]:
    """Two readers of a model input or a weight."""
    if relation(first.placement, entry.placement) == "exchange":
        yield error(
            entry.annotation.label,
            entry.tensor,
            f"{first.annotation.label} takes it {first.placement.describe()}, this node "
            f"{entry.placement.describe()}, with other parts on the devices",
            "give both nodes the same spec, or each a tensor of its own",
        )


def _check_stages(model: onnx.ModelProto, configuration: str) -> Iterator[Finding]:
    """Within one configuration stages must not go backwards, and should have no gaps."""
    stages: dict[str, tuple[int, Annotation]] = {}
    found: dict[int, None] = {}
    for annotation in annotations_of(model):
        if annotation.configuration != configuration or annotation.is_inner or annotation.stage is None:
            continue
        found[annotation.stage] = None
        for name in annotation.node.output:
            if name:
                stages[name] = (annotation.stage, annotation)
    if not found:
        return
    yield from _check_order(model, configuration, stages)
    missing = next((number for number in range(len(found)) if number not in found), None)
    if missing is not None:
        yield warning(
            "",
            "",
            f'no node of configuration "{configuration}" is in pipeline stage {missing}, but some are in stage '
            f"{max(found)}",
            "number the stages without gaps, from 0",
        )


def _check_order(
    model: onnx.ModelProto, configuration: str, stages: Mapping[str, tuple[int, Annotation]]
) -> Iterator[Finding]:
    """Follow the stages along the graph; a node without one runs where its inputs are."""
    reached: dict[str, tuple[int, str]] = {}
    unstaged: list[str] = []
    for node in model.graph.node:
        latest, whose = max((reached[name] for name in node.input if name in reached), default=(0, ""))
        own = next((stages[name][0] for name in node.output if name in stages), None)
        if own is not None and whose and own < latest:
            tensor = next(name for name in node.input if reached.get(name) == (latest, whose))
            yield error(
                label_of(node),
                tensor,
                f'the node is in pipeline stage {own} of configuration "{configuration}", but it needs a value of '
                f"{whose} in stage {latest}",
                f"put the node into stage {latest} or a later one",
            )
        if own is None:
            has_specs = any(entry.configuration_id == configuration for entry in node.device_configurations)
            unstaged += [label_of(node)] if has_specs else []
        here = (latest, whose) if own is None else (own, label_of(node))
        reached.update((name, here) for name in node.output if name)
    if unstaged:
        yield warning(
            unstaged[0],
            "",
            f"{len(unstaged)} annotated nodes, this one first, have no pipeline stage in configuration "
            f'"{configuration}", others have',
            "give every node a stage, or none",
        )
