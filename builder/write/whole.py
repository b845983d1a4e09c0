"""Which large weights every rank has whole, and which splits take many collectives, each with its cause."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from furiosa_llm.builder.lower.build import Build
from furiosa_llm.builder.lower.program_builder import ShardedTensor

_SHARE = 0.01
"""A whole matrix gets a line if it is larger than this share of all weights."""
_MANY = 4
"""A split with this many sums gets a line; the heads or the feed-forward of a layer need one sum."""


def shortfalls(build: Build, model_nbytes: int) -> tuple[str, ...]:
    """A line for each matrix of more than a hundredth of the weights that is whole, and for each split of many sums."""
    return (*_whole(build, model_nbytes), *_scattered(build))


def _whole(build: Build, model_nbytes: int) -> Iterator[str]:
    read = {value.name for node in build.lowered.graph for value in node.inputs if value is not None}
    tensors = [t for t in build.lowered.tensors.values() if t.layout and not t.shard_axes and t.name in read]
    for tensor in sorted(tensors, key=lambda t: -t.local_nbytes):
        if len(tensor.local_shape) > 1 and tensor.local_nbytes > _SHARE * model_nbytes:
            shown = f"{tensor.name} {list(tensor.local_shape)}, {tensor.local_nbytes / model_nbytes:.0%} of the weights"
            yield f"{shown}, is whole on every PE: {_cause(tensor, build)}"


def _cause(tensor: ShardedTensor, build: Build) -> str:
    readers = [
        info for info in build.analysis.nodes if any(v is not None and v.name == tensor.name for v in info.node.inputs)
    ]
    noted = next((info.rule.note for info in readers if info.rule.note is not None), None)
    if noted is not None:
        return noted
    groups = [group for group in build.plan.groups if tensor.name in group.weights]
    if readers and not groups:
        return f"{readers[0].node.op_type} uses it whole"
    refused = next((refusal.reason for refusal in build.plan.refused if refusal.group in groups), None)
    return refused or "no split of it saves more than its collectives cost"


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
