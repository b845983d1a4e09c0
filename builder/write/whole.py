"""Which large weights are in fewer parts than there are ranks, which splits take many collectives, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import onnx_ir as ir

from furiosa_llm.builder.lower.build import Build
from furiosa_llm.builder.lower.program_builder import ShardedTensor
from furiosa_llm.builder.write.shards import num_shards

_SHARE = 0.01
"""Matrices get a line if they are more than this share of all weights."""
_MANY = 4
"""A split with this many sums gets a line; the heads or the feed-forward of a layer need one sum."""


def shortfalls(build: Build, model_nbytes: int) -> tuple[str, ...]:
    """A line for each cause of more than a hundredth of the weights in too few parts, and each split of many sums."""
    return (*_whole(build, model_nbytes), *_scattered(build))


def _whole(build: Build, model_nbytes: int) -> Iterator[str]:
    """The matrices that are in fewer parts than there are PEs, those with one cause together, the most bytes first."""
    mesh = build.plan.mesh
    read = {value.name for node in build.lowered.graph for value in node.inputs if value is not None}
    values = {id(value.const_value): value for value in build.analysis.graph.initializers.values()}
    notes = {info.node: info.rule.note for info in build.analysis.nodes}
    found: dict[tuple[int, str], list[ShardedTensor]] = {}
    for tensor in build.lowered.tensors.values():
        parts, value = num_shards(tensor, mesh), values.get(id(tensor.source))
        if value is not None and parts < mesh.size and len(tensor.local_shape) > 1 and tensor.name in read:
            found.setdefault((parts, _cause(value, build, notes)), []).append(tensor)
    for (parts, cause), tensors in sorted(found.items(), key=lambda item: -_held(item[1])):
        share = parts * _held(tensors) / (model_nbytes or 1)
        if share > _SHARE:
            largest = max(tensors, key=lambda t: t.local_nbytes)
            shown = f"{largest.name} {list(largest.local_shape)}"
            if len(tensors) > 1:
                shown += f" and {len(tensors) - 1} like it"
            where = "whole on every PE" if parts == 1 else f"in {parts} parts for {mesh.size} PEs"
            verb = "is" if len(tensors) == 1 else "are"
            yield f"{shown}, {share:.0%} of the weights, {verb} {where}: {cause}"


def _held(tensors: Sequence[ShardedTensor]) -> int:
    return sum(tensor.local_nbytes for tensor in tensors)


def _cause(weight: ir.Value, build: Build, notes: Mapping[ir.Node, str | None]) -> str:
    choices, leaves = build.plan.choices, {leaf for dim in build.analysis.dims[weight] for leaf in dim.leaves()}
    wider = [r for r in build.plan.refused if len(r.axes) > len(choices.get(r.group, ()))]
    refusals = [r for r in wider if not leaves.isdisjoint(r.group.leaves)]
    for refused in refusals:
        if choices.get(refused.group):  # it is split as far as this group goes
            return f"{refused.group.role}: {refused.reason}"
    readers = [node for node, _ in weight.uses()]
    noted = next((notes[node] for node in readers if notes.get(node) is not None), None)
    if noted is not None:
        return noted
    if readers and leaves.isdisjoint(leaf for group in build.plan.groups for leaf in group.leaves):
        return f"{readers[0].op_type} uses it whole"
    if refusals:
        return f"{refusals[0].group.role}: {refusals[0].reason}"
    return "no split of it saves more than its collectives cost"


def _scattered(build: Build) -> Iterator[str]:
    """Splits that need a sum for each of many products, as when attention has each head in a weight of its own."""
    sums = Counter(leaf for info in build.analysis.nodes for factor in info.reduced for leaf in factor.leaves())
    for group, axes in build.plan.choices.items():
        count = sum(sums[leaf] for leaf in group.leaves)
        if axes and count >= _MANY * len(group.leaves):
            yield (
                f"{group.role}, {group.size} over {build.plan.mesh.parts(axes)} PEs, takes {count} sums: so many "
                f"products of their own ({group.description:.80}) contract it, as in attention that is written head by "
                "head; export the model with all heads of a layer in one weight."
            )
