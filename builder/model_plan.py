"""`plan_model`: what a build would give for each tensor parallel size, without the weights and without writing it."""

from __future__ import annotations

import dataclasses
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from furiosa_llm.builder.errors import OptionError
from furiosa_llm.builder.lower.build import Build
from furiosa_llm.builder.lower.layouts import Layouts
from furiosa_llm.builder.lower.pe_memory import Memory, Workload
from furiosa_llm.builder.pipeline import analyse_model
from furiosa_llm.builder.plan.annotations import annotate, write_annotated
from furiosa_llm.builder.plan.explain import Explained, explain
from furiosa_llm.builder.plan.mesh import check_tensor_parallel_size, mesh_of
from furiosa_llm.builder.plan.search import MAX_PADDING
from furiosa_llm.builder.plan.tactics import Tactics
from furiosa_llm.builder.source import companions
from furiosa_llm.builder.write.report import notes, padding_nbytes, state_nbytes_per_token
from furiosa_llm.runtime.artifact.card import PE_BYTES_PER_S, PE_NBYTES, PES_PER_CARD

CARDS = (1, 2, 4, 8, 16, 32)
"""How many cards are tried."""
DEFAULT_CONTEXT = 2048
DEFAULT_CHUNK = 512


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """The least pipelined way to fit a number of cards."""

    cards: int
    pipeline_parallel_size: int
    data_parallel_size: int
    pe_nbytes: int
    """Weights, KV cache and activations on the fullest PE."""
    fits: bool
    free_tokens: int
    """How many more positions of KV cache each replica has room for; 0 if it does not fit."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveCost:
    """Equal collectives of one decoded token of one sequence."""

    kind: str
    parts: int
    """How many ranks take part."""
    nbytes: int
    """What the collective gives each rank."""
    count: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SizePlan:
    """The plan for one tensor parallel size. Bytes are of one PE unless said otherwise."""

    tensor_parallel_size: int
    weight_nbytes: int
    replicated_nbytes: int
    """Of the weights, those that every PE holds alike."""
    padding_nbytes: int
    """Of all PEs' weights together, zeros that stand for padding."""
    state_nbytes: int
    """KV cache at the workload's context and batch."""
    state_nbytes_per_token: int
    activation_nbytes: int | None
    """The most alive at once, of a decode and a prefill step; None if the model does not take the workload's sizes."""
    collectives: tuple[CollectiveCost, ...]
    choices: tuple[Explained, ...]
    replicated: tuple[str, ...]
    """Ops that were replicated for want of a rule, and why."""
    num_blocks: int
    """Pipeline stages are runs of these."""
    floor_us: float
    """Reading the weights once at the PE's memory bandwidth: no decode step is faster with one stage."""
    deployments: tuple[Deployment, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelPlan:
    """What `furiosa-llm plan` shows."""

    model: str
    num_nodes: int
    """Of the normalised graph."""
    num_parameters: int
    """Elements of the model's floating point and quantised weights of two or more dimensions, and of vectors."""
    nbytes: int
    """Of the model's initializers."""
    workload: Workload
    plans: tuple[SizePlan, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values, for `--json`."""
        return dataclasses.asdict(self)


def plan_model(
    model: str | os.PathLike[str],
    *,
    tensor_parallel_sizes: Sequence[int] = (4, 8),
    context: int | None = None,
    batch: int = 1,
    chunk: int = DEFAULT_CHUNK,
    dims: Mapping[str, int] | None = None,
    max_padding: float = MAX_PADDING,
    tactics: Tactics | None = None,
    experimental_tp: bool = False,
    fuse_attention: bool = True,
    roles: Mapping[str, str] | None = None,
    fixed: Mapping[str, int] | None = None,
) -> tuple[ModelPlan, tuple[Build, ...]]:
    """Plan a model; its weights' files need not be there, and are not read.

    Args:
        model: Path of the .onnx file.
        tensor_parallel_sizes: The sizes to plan for.
        context: Positions that each sequence may reach; 2048 if None, or the model's own limit if that is less.
        batch: Sequences decoded together.
        chunk: New positions of one sequence in a prefill step.
        dims: Sizes of dynamic input dimensions that do not follow from the model.
        max_padding: By how much padding may make one dimension larger.
        tactics: Choices that the planner must keep.
        experimental_tp: Also allow tensor parallel sizes 1, 2 and 16.
        fuse_attention: As `ArtifactBuilder` does; without, every node of the model has its place in the plan.
        roles: As `ArtifactBuilder` takes them.
        fixed: As `ArtifactBuilder` takes them.

    Returns:
        The figures for people, and the plans and programs behind them, one for each size.
    """
    for size in tensor_parallel_sizes:
        check_tensor_parallel_size(size, experimental=experimental_tp)
    for name, number in (("context", context), ("batch", batch), ("chunk", chunk)):
        if number is not None and number < 1:
            raise OptionError(f"{name} must be at least 1, got {number}.")
    path = Path(model)
    analysed = analyse_model(
        path, dims or {}, fuse=fuse_attention, told=lambda _: None, roles=roles or {}, fixed=fixed or {}
    )
    limit = companions.max_sequence_length(path)
    workload = Workload(context=context or min(limit or DEFAULT_CONTEXT, DEFAULT_CONTEXT), batch=batch, chunk=chunk)
    builds = tuple(
        analysed.lowered_for(mesh_of(size), max_padding=max_padding, tactics=tactics, told=lambda _: None)
        for size in tensor_parallel_sizes
    )
    initializers = analysed.source.model.graph.initializers.values()
    tensors = {id(t): t for value in initializers if (t := value.const_value) is not None}
    plan = ModelPlan(
        model=str(path),
        num_nodes=len(analysed.model.graph),
        num_parameters=sum(tensor.size for tensor in tensors.values()),
        nbytes=sum(tensor.nbytes for tensor in tensors.values()),
        workload=workload,
        plans=tuple(_size_plan(build, workload) for build in builds),
    )
    return plan, builds


def write_annotated_plan(build: Build, workload: Workload, path: str | os.PathLike[str], stages: int = 1) -> None:
    """Write the unsplit model with the plan of `build` as ONNX multi-device annotations, over `stages` stages.

    Raises OptionError if the model has fewer blocks than stages, and OutputError if the file cannot be written.
    """
    memory = Memory(build, workload)
    stage_of = memory.stages_of_values(stages)
    if stage_of is None:
        raise OptionError(
            f"{stages} stages are more than the {len(memory.blocks)} blocks of the model; use at most that."
        )
    plan = build.plan
    model = annotate(build.source, build.analysis, plan.assignment, plan.outcome, plan.mesh, stages=stage_of)
    write_annotated(model, build.source, path)


def _size_plan(build: Build, workload: Workload) -> SizePlan:
    memory = Memory(build, workload)
    tensors = build.lowered.tensors.values()
    weights = memory.weights_nbytes
    return SizePlan(
        tensor_parallel_size=build.plan.mesh.size,
        weight_nbytes=weights,
        replicated_nbytes=sum(t.local_nbytes for t in tensors if t.layout and not t.shard_axes),
        padding_nbytes=padding_nbytes(tensors, build.plan.mesh),
        state_nbytes=memory.state_nbytes,
        state_nbytes_per_token=state_nbytes_per_token(build),
        activation_nbytes=memory.activation_nbytes,
        collectives=tuple(_collectives(build)),
        choices=explain(build.plan, build.analysis),
        replicated=notes(build.analysis),
        num_blocks=len(memory.blocks),
        floor_us=weights / PE_BYTES_PER_S * 1e6,
        deployments=tuple(_deployments(build, memory, workload)),
    )


def _collectives(build: Build) -> Iterator[CollectiveCost]:
    layouts = Layouts(build.analysis, build.plan.assignment, build.plan.mesh)
    facts = build.probes.decode.facts
    counts: Counter[tuple[str, int, int]] = Counter()
    for collective in build.plan.outcome.collectives:
        value, fact = collective.value, facts[collective.value]
        whole = (collective.dim,) if collective.dim is not None else ()
        shares = zip(layouts.local_shape(value, whole), build.analysis.facts[value].shape, strict=True)
        local = math.prod(a / b for a, b in shares if b)
        nbytes = math.prod(fact.shape) * local * fact.dtype.bitwidth / 8 / build.probes.decode.positions
        counts[collective.kind, build.plan.mesh.parts(collective.axes), round(nbytes)] += 1
    for (kind, parts, nbytes), count in sorted(counts.items()):
        yield CollectiveCost(kind=kind, parts=parts, nbytes=nbytes, count=count)


def _deployments(build: Build, memory: Memory, workload: Workload) -> Iterator[Deployment]:
    """For each number of cards the fewest stages that fit; where none fits, the most stages."""
    size = build.plan.mesh.size
    kept = {stages: memory.stages_nbytes(stages) for stages in range(1, max(CARDS) + 1)}
    for cards in CARDS:
        possible = [n for n in range(1, cards + 1) if kept[n] is not None and cards * PES_PER_CARD % (size * n) == 0]
        options = [_deployment(memory, workload, cards, stages, max(kept[stages] or ()), size) for stages in possible]
        if options:
            yield next((option for option in options if option.fits), options[-1])


def _deployment(
    memory: Memory, workload: Workload, cards: int, stages: int, fullest_stage: int, size: int
) -> Deployment:
    fullest = fullest_stage + (memory.activation_nbytes or 0)
    per_token = memory.state_nbytes / (workload.context * workload.batch) / stages
    free = (PE_NBYTES - fullest) / per_token if per_token else 0
    return Deployment(
        cards=cards,
        pipeline_parallel_size=stages,
        data_parallel_size=cards * PES_PER_CARD // (size * stages),
        pe_nbytes=fullest,
        fits=fullest <= PE_NBYTES,
        free_tokens=max(0, int(free)),
    )
