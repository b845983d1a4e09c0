"""What a build did: its report."""

from __future__ import annotations

import dataclasses
import math
import resource
import sys
from collections import Counter
from collections.abc import Iterable
from typing import Any

from furiosa_llm.builder.factors.analysis import Analysis
from furiosa_llm.builder.lower.build import Build
from furiosa_llm.builder.lower.kernels import MissingKernel
from furiosa_llm.builder.lower.program_builder import ShardedTensor
from furiosa_llm.builder.plan.assignment_json import assignment_json
from furiosa_llm.builder.plan.plan import Plan
from furiosa_llm.builder.source.tensors import weights_of
from furiosa_llm.builder.write.build_report import BuildReport, Decision
from furiosa_llm.builder.write.shards import num_shards
from furiosa_llm.builder.write.wants import wants
from furiosa_llm.builder.write.whole import shortfalls
from furiosa_llm.runtime.artifact.compute import float32_memory
from furiosa_llm.runtime.artifact.layout import Mesh, global_size
from furiosa_llm.runtime.artifact.manifest import Manifest


def report_of(
    build: Build,
    manifest: Manifest,
    *,
    artifact: str,
    seconds: float,
    faults: tuple[str, ...],
    missing_kernels: tuple[MissingKernel, ...],
) -> BuildReport:
    """The report of a build whose artifact has been written."""
    mesh = build.plan.mesh
    tensors = list(build.lowered.tensors.values())
    read = {str(value.name) for node in build.lowered.graph for value in node.inputs if value is not None}
    replicated = sorted((t for t in tensors if t.layout and not t.shard_axes), key=lambda t: -t.local_nbytes)
    model_nbytes = sum(tensor.nbytes for tensor in weights_of(build.source.model))
    return BuildReport(
        artifact=artifact,
        tensor_parallel_size=mesh.size,
        weight_nbytes=sum(t.local_nbytes for t in tensors if t.name in read),
        replicated_nbytes=sum(t.local_nbytes for t in replicated),
        padding_nbytes=padding_nbytes(tensors, mesh),
        model_nbytes=model_nbytes,
        stored_nbytes=sum(f.nbytes for f in manifest.files if f.path.startswith("weights-")),
        state_nbytes_per_token=sum(manifest.state_nbytes.values()),
        collectives=dict(Counter(collective.kind for collective in manifest.collectives)),
        collective_nbytes=sum(map(manifest.payload_nbytes, manifest.collectives)),
        decisions=decisions(build.plan),
        replicated=tuple(f"{t.name} {list(t.local_shape)} ({_why_whole(t, build)})" for t in replicated),
        notes=notes(build.analysis),
        fused_attentions=build.fusion.fused,
        attentions_left=build.fusion.left,
        shortfalls=shortfalls(build, model_nbytes),
        warnings=wants(build.source.path, manifest.model),
        faults=faults,
        missing_kernels=missing_kernels,
        float32=float32_memory(manifest, read),
        num_nodes=len(build.lowered.graph),
        seconds=seconds,
        peak_rss_nbytes=_peak_rss_nbytes(),
    )


def _why_whole(tensor: ShardedTensor, build: Build) -> str:
    """Which ops read a replicated weight, which they need whole or which is not worth the collectives of a split."""
    readers = {
        node.op_type
        for node in build.lowered.graph
        if any(value is not None and value.name == tensor.name for value in node.inputs)
    }
    return f"read by {', '.join(sorted(readers))}" if readers else "not used"


def padding_nbytes(tensors: Iterable[ShardedTensor], mesh: Mesh) -> int:
    """Zeros in the weights files that no original element stands for."""
    return sum(_padding_nbytes(tensor, mesh) for tensor in tensors)


def _padding_nbytes(tensor: ShardedTensor, mesh: Mesh) -> int:
    """Zeros in the stored tensor that no original element stands for."""
    if tensor.layout is None:
        return 0
    elements = math.prod(tensor.local_shape) * num_shards(tensor, mesh)
    return (elements - math.prod(global_size(dim) for dim in tensor.layout)) * tensor.dtype.bitwidth // 8


def _peak_rss_nbytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def decisions(plan: Plan) -> tuple[Decision, ...]:
    """The plan's choices, largest group first."""
    found = []
    for group, axes in plan.choices.items():
        parts = plan.mesh.parts(axes)
        found.append(
            Decision(
                role=group.role,
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


def plan_json(build: Build) -> dict[str, Any]:
    """The manifest's `plan`: what was split, at what price, and what was not taken."""
    plan = build.plan
    return {
        "padding_nbytes": padding_nbytes(build.lowered.tensors.values(), plan.mesh),
        "assignment": assignment_json(build.analysis, plan.assignment),
        "choices": [dataclasses.asdict(d) for d in decisions(plan)],
        "price": {"nbytes": plan.price.nbytes, "collectives": plan.price.collectives},
        "unsplit_price": {"nbytes": plan.unsplit.nbytes, "collectives": plan.unsplit.collectives},
        "refused": [
            {"size": r.group.size, "where": r.group.description, "axes": list(r.axes), "reason": r.reason}
            for r in plan.refused
        ],
        "notes": list(notes(build.analysis)),
        "attention": {"fused": build.fusion.fused, "left": list(build.fusion.left)},
    }
