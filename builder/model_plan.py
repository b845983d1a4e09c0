"""`plan_model`: what a build would give for each tensor parallel size; it reads no weights and writes no artifact."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from furiosa_llm.builder.errors import OptionError
from furiosa_llm.builder.lower.build import Build
from furiosa_llm.builder.lower.working_memory import working_nbytes
from furiosa_llm.builder.options import BuildOptions
from furiosa_llm.builder.pipeline import analyse_model
from furiosa_llm.builder.plan.annotations import annotate, write_annotated
from furiosa_llm.builder.plan.explain import Explained, explain
from furiosa_llm.builder.plan.search import MAX_PADDING
from furiosa_llm.builder.plan.tactics import Tactics
from furiosa_llm.builder.source import companions
from furiosa_llm.builder.write.artifact import planned
from furiosa_llm.builder.write.report import notes, padding_nbytes
from furiosa_llm.runtime.artifact.card import PE_BYTES_PER_S, PES_PER_CARD
from furiosa_llm.runtime.artifact.manifest import Manifest
from furiosa_llm.runtime.artifact.options import COUNT
from furiosa_llm.runtime.placement.block_reads import read_blocks
from furiosa_llm.runtime.placement.capacity import (
    DEFAULT_CHUNK_SIZE,
    DEFAULT_LENGTH,
    Memory,
    StageMemory,
    Workload,
    card_memory,
    kv_pages,
)
from furiosa_llm.runtime.placement.stages import choose_stages, divide_blocks
from furiosa_llm.runtime.placement.topology import make_topology

CARDS = (1, 2, 4, 8, 16, 32)
"""The numbers of cards that are tried."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """The deployment on a number of cards that has the fewest pipeline stages."""

    cards: int
    pipeline_parallel_size: int
    data_parallel_size: int
    pe_nbytes: int
    """Weights, KV cache and activations on a PE of the fullest card, whose PEs share its memory."""
    fits: bool
    free_tokens: int
    """How many more positions of KV cache each replica has room for; 0 if the model does not fit, or has no cache."""


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
    """The weights that every PE holds alike."""
    padding_nbytes: int
    """The zeros that pad the weights, of all PEs together."""
    state_nbytes: int
    """KV cache at the workload's context and batch."""
    state_nbytes_per_token: int
    activation_nbytes: int | None
    """Values that wait between segments, in the larger of a decode and a prefill step; None if the program does not
    state their sizes."""
    working_nbytes: int | None
    """The most bytes alive at once in those steps, also inside segments; None if the model does not take the workload's
    sizes. The engine does not admit requests by this number."""
    collectives: tuple[CollectiveCost, ...]
    choices: tuple[Explained, ...]
    replicated: tuple[str, ...]
    """Ops that are replicated because no rule can split them, and why."""
    num_blocks: int
    """A pipeline stage is a run of blocks."""
    floor_us: float
    """The time to read the weights once at the PE's memory bandwidth: with one stage no decode step is faster."""
    deployments: tuple[Deployment, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelPlan:
    """What `furiosa-llm plan` shows."""

    model: str
    num_nodes: int
    """Nodes of the normalised graph."""
    num_parameters: int
    """Elements of the model's floating point and quantised weights of two or more dimensions, and of vectors."""
    nbytes: int
    """Bytes of the model's initializers."""
    workload: Workload
    plans: tuple[SizePlan, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values, for `--json`."""
        work = self.workload
        sizes = {"context": work.max_model_len, "batch": work.max_batch_size, "chunk": work.prefill_chunk_size}
        return {**dataclasses.asdict(self), "workload": sizes}


def plan_model(
    model: str | os.PathLike[str],
    *,
    tensor_parallel_sizes: Sequence[int] = (4, 8),
    context: int | None = None,
    batch: int = 1,
    chunk: int = DEFAULT_CHUNK_SIZE,
    dims: Mapping[str, int] | None = None,
    max_padding: float = MAX_PADDING,
    tactics: Tactics | None = None,
    experimental_tp: bool = False,
    fuse_attention: bool = True,
    roles: Mapping[str, str] | None = None,
    fixed: Mapping[str, int] | None = None,
) -> tuple[ModelPlan, tuple[Build, ...]]:
    """Plan a model; the files of its weights need not exist, and are not read.

    Args:
        model: Path of the .onnx file.
        tensor_parallel_sizes: The sizes to plan for.
        context: Positions that each sequence may reach; 2048 if None, or the model's own limit if that is less.
        batch: Sequences decoded together.
        chunk: New positions of one sequence in a prefill step.
        dims: Sizes of input dimensions that the model leaves open, by symbol or input.symbol.
        max_padding: By how much padding may enlarge a dimension (1.34: by a third).
        tactics: Choices to keep (see docs/planning.md).
        experimental_tp: Also allow a tensor parallel size of 1, 2 or 16.
        fuse_attention: Replace attention written out in small ops by one op with its cache in place.
            Without, every node of the model has its place in the plan.
        roles: What an input is for, where the graph does not say: INPUT=positions[3,batch,sequence].
        fixed: Makes an input a constant: one boolean or integer.

    Returns:
        The figures for people, and the builds with the plans and programs that they describe, one for each size.
    """
    options = BuildOptions(
        dims=dict(dims or {}),
        max_padding=max_padding,
        tactics=tactics,
        fuse_attention=fuse_attention,
        roles=dict(roles or {}),
        fixed=dict(fixed or {}),
    )
    of_sizes = [dataclasses.replace(options, tensor_parallel_size=size) for size in tensor_parallel_sizes]
    for of_size in of_sizes:
        of_size.check(experimental_tp=experimental_tp)
    for name, number in (("context", context), ("batch", batch), ("chunk", chunk)):
        if number is not None:
            COUNT.check(name, number, OptionError)
    path = Path(model)
    analysed = analyse_model(path, options, told=lambda _: None)
    limit = companions.max_sequence_length(path)
    workload = Workload(
        max_batch_size=batch,
        max_model_len=context or min(limit or DEFAULT_LENGTH, DEFAULT_LENGTH),
        prefill_chunk_size=chunk,
    )
    builds = tuple(analysed.lowered_for(of_size, told=lambda _: None) for of_size in of_sizes)
    initializers = analysed.source.model.graph.initializers.values()
    tensors = {id(t): t for value in initializers if (t := value.const_value) is not None}
    plan = ModelPlan(
        model=str(path),
        num_nodes=len(analysed.model.graph),
        num_parameters=sum(tensor.size for tensor in tensors.values()),
        nbytes=sum(tensor.nbytes for tensor in tensors.values()),
        workload=workload,
        plans=tuple(size_plan(build, workload) for build in builds),
    )
    return plan, builds


def write_annotated_plan(build: Build, path: str | os.PathLike[str], stages: int = 1) -> None:
    """Write the unsplit model with the plan of `build` as ONNX multi-device annotations, over `stages` stages.

    Raises OptionError if the model has fewer blocks than stages, and OutputError if the file cannot be written.
    """
    model = planned(build)
    blocks = len(model.manifest.blocks)
    if stages > blocks:
        raise OptionError(f"{stages} stages are more than the {blocks} blocks of the model; use at most that.")
    stage_of = {
        name: stage.index
        for stage in choose_stages(model, pipeline_parallel_size=stages)
        for node in model.program.graph.node[stage.first_node : stage.stop_node]
        for name in node.output
    }
    plan = build.plan
    annotated = annotate(build.source, build.analysis, plan.assignment, plan.outcome, plan.mesh, stages=stage_of)
    write_annotated(annotated, build.source, path)


def size_plan(build: Build, workload: Workload) -> SizePlan:
    """The figures of a build, of which nothing is written, for `workload`."""
    model = planned(build)
    blocks, memory = read_blocks(model), Memory(model)

    @functools.cache
    def stages(count: int) -> tuple[StageMemory, ...]:
        return memory.of_stages(divide_blocks(blocks, pipeline_parallel_size=count), workload)

    (whole,) = stages(1)
    tensors = build.lowered.tensors.values()
    return SizePlan(
        tensor_parallel_size=build.plan.mesh.size,
        weight_nbytes=whole.weight_nbytes,
        replicated_nbytes=sum(t.local_nbytes for t in tensors if t.layout and not t.shard_axes),
        padding_nbytes=padding_nbytes(tensors, build.plan.mesh),
        state_nbytes=whole.kv_nbytes_per_token * workload.max_batch_size * workload.max_model_len,
        state_nbytes_per_token=whole.kv_nbytes_per_token,
        activation_nbytes=whole.activation_nbytes,
        working_nbytes=working_nbytes(build, workload),
        collectives=tuple(_collectives(model.manifest)),
        choices=explain(build.plan, build.analysis),
        replicated=notes(build.analysis),
        num_blocks=len(blocks),
        floor_us=whole.weight_nbytes / PE_BYTES_PER_S * 1e6,
        deployments=tuple(_deployments(build.plan.mesh.size, len(blocks), stages, workload)),
    )


def _collectives(manifest: Manifest) -> Iterator[CollectiveCost]:
    counts = Counter((c.kind, manifest.mesh.parts(c.axes), manifest.payload_nbytes(c)) for c in manifest.collectives)
    for (kind, parts, nbytes), count in sorted(counts.items()):
        yield CollectiveCost(kind=kind, parts=parts, nbytes=nbytes, count=count)


def _deployments(
    size: int, blocks: int, stages_of: Callable[[int], Sequence[StageMemory]], workload: Workload
) -> Iterator[Deployment]:
    """For each number of cards the deployment that fits with the fewest stages; if none fits, the one with the most."""
    if size > PES_PER_CARD:
        return  # all ranks of a stage must be on one card
    for cards in CARDS:
        possible = [n for n in range(1, min(cards, blocks) + 1) if cards * PES_PER_CARD % (size * n) == 0]
        for count in possible:
            deployment = _deployment(size, cards, stages_of(count), workload)
            if deployment.fits or count == possible[-1]:
                yield deployment
                break


def _deployment(size: int, cards: int, stages: Sequence[StageMemory], workload: Workload) -> Deployment:
    topology = make_topology(
        size, pipeline_parallel_size=len(stages), devices=[f"npu:{number}" for number in range(cards)]
    )
    used = card_memory(topology, stages, workload)
    fits = all(card.free_nbytes >= 0 for card in used)
    tokens = kv_pages(topology, stages, page_size=1) if fits else None
    return Deployment(
        cards=cards,
        pipeline_parallel_size=topology.pipeline_parallel_size,
        data_parallel_size=topology.data_parallel_size,
        pe_nbytes=max(card.pe_nbytes for card in used),
        fits=fits,
        free_tokens=0 if tokens is None else tokens - workload.max_batch_size * workload.max_model_len,
    )
