"""The bytes of weights that a PE reads for a decode step, where tables are looked up and experts chosen."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from furiosa_llm.builder.lower.build import Build
from furiosa_llm.builder.lower.working_memory import FactsOfStep, decode_sizes
from furiosa_llm.builder.rules.registry import nbytes_read
from furiosa_llm.builder.rules.view import NodeView
from furiosa_llm.runtime.placement.workload import Workload


def weight_reads(
    build: Build, workload: Workload, weights: Mapping[str, int], facts_of: FactsOfStep
) -> tuple[int, int]:
    """The least and the most bytes: all sequences choose the same rows and experts, or each its own.

    `weights` are the bytes of each on one rank, in the type that is computed in.

    A weight that several nodes read counts once, as the one that reads most of it does. Where the model does not take
    the workload's sizes, everything counts as read.
    """
    one = facts_of(decode_sizes(dataclasses.replace(workload, max_batch_size=1)))
    if one is None:
        return sum(weights.values()), sum(weights.values())
    opset = build.lowered.graph.opset_imports.get("", 1)
    read: dict[str, int] = {}
    for node in build.lowered.graph:
        named = {port: str(v.name) for port, v in enumerate(node.inputs) if v is not None and str(v.name) in weights}
        if named:
            counted = nbytes_read(NodeView(node, one, one, opset))
            for port, name in named.items():
                read[name] = max(read.get(name, 0), counted[port])
    most = sum(min(weights[name], count * workload.max_batch_size) for name, count in read.items())
    return sum(read.values()), most
