"""`plan_model`: what a build would give for each tensor parallel size; it reads no weights and writes no artifact."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from furiosa_llm.builder.errors import OptionError
from furiosa_llm.builder.lower.build import Build
from furiosa_llm.builder.lower.kernels import missing_kernels
from furiosa_llm.builder.lower.step_costs import step_costs
from furiosa_llm.builder.lower.weight_reads import weight_reads
from furiosa_llm.builder.lower.working_memory import FactsOfStep, WorkingMemory, facts_at, working_memory
from furiosa_llm.builder.options import BuildOptions
from furiosa_llm.builder.pipeline import analyse_model
from furiosa_llm.builder.plan.annotations import annotate, write_annotated
from furiosa_llm.builder.plan.explain import explain
from furiosa_llm.builder.plan.mesh import MAX_PADDING
from furiosa_llm.builder.plan.tactics import Tactics
from furiosa_llm.builder.plan_figures import SHOWN_BATCH, SHOWN_CARDS, CollectiveCost, ModelPlan, Room, SizePlan
from furiosa_llm.builder.source.folder import find_model
from furiosa_llm.builder.source.tensors import weights_of
from furiosa_llm.builder.write.artifact import planned
from furiosa_llm.builder.write.report import notes, padding_nbytes
from furiosa_llm.runtime.artifact.adapters.stored import module_names, read_adapters
from furiosa_llm.runtime.artifact.card import PE_BYTES_PER_S, PE_NBYTES
from furiosa_llm.runtime.artifact.compute import computing, loaded_nbytes
from furiosa_llm.runtime.artifact.manifest import Manifest
from furiosa_llm.runtime.artifact.options import COMPUTE, COUNT
from furiosa_llm.runtime.artifact.progress import shown, tell
from furiosa_llm.runtime.placement.deployments import Deployment, Deployments
from furiosa_llm.runtime.placement.stages import choose_stages
from furiosa_llm.runtime.placement.workload import DEFAULT_CHUNK_SIZE, DEFAULT_LENGTH, MOST_CARDS, Workload

CHUNKS = (DEFAULT_CHUNK_SIZE, 128, 64, 32)
"""The prefill chunks that are tried where the caller does not choose one."""


@shown()
def plan_model(
    model: str | os.PathLike[str],
    *,
    tensor_parallel_sizes: Sequence[int] = (4, 8),
    context: int | None = None,
    batch: int = 1,
    chunk: int | None = None,
    cards: int | None = None,
    dims: Mapping[str, int] | None = None,
    max_padding: float = MAX_PADDING,
    tactics: Tactics | None = None,
    experimental_tp: bool = False,
    compute: str | None = None,
    fuse_attention: bool = True,
    roles: Mapping[str, str] | None = None,
    fixed: Mapping[str, int] | None = None,
    lora_modules: Sequence[str] = (),
    lora: Mapping[str, str | os.PathLike[str]] | None = None,
    costs: bool = False,
) -> ModelPlan:
    """Plan a model; the files of its weights need not exist, and are not read.

    Args:
        model: Path of the .onnx file.
        tensor_parallel_sizes: The sizes to plan for.
        context: Positions that each sequence may reach; if None the model's own limit, or 2048 if its files say none.
        batch: Sequences decoded together by each replica.
        chunk: New positions of one sequence in a prefill step; if None the largest of `CHUNKS` with which the fewest
            cards suffice.
        cards: The number of cards; up to 32 if None.
        dims: Sizes of input dimensions that the model leaves open, by symbol or input.symbol.
        max_padding: By how much padding may enlarge a dimension (1.34: by a third).
        tactics: Choices to keep (see docs/planning.md).
        experimental_tp: Also allow a tensor parallel size of 1, 2 or 16.
        compute: The type to compute in, "float32"; the model's own if None. Memory is counted so.
        fuse_attention: Replace attention written out in small ops by one op with its cache in place.
            Without, every node of the model has its place in the plan.
        roles: What an input is for, where the graph does not say: INPUT=positions[3,batch,sequence].
        fixed: Makes an input a constant: one boolean or integer.
        lora_modules: Modules whose products get inputs for adapters, where the graph has none. Those that the
            adapters of `lora` name are among them.
        lora: Adapters that would go into the artifact, by name: the folder or .safetensors file of each.
        costs: Also find what any step costs.

    Returns:
        The figures, which `print` and notebooks show in tables, with the builds that they describe, one for each size.
    """
    options = BuildOptions(
        dims=dict(dims or {}),
        max_padding=max_padding,
        tactics=tactics,
        fuse_attention=fuse_attention,
        roles=dict(roles or {}),
        fixed=dict(fixed or {}),
        lora_modules=sorted(module_names(read_adapters(lora or {})).union(lora_modules)),
    )
    of_sizes = [dataclasses.replace(options, tensor_parallel_size=size) for size in tensor_parallel_sizes]
    for of_size in of_sizes:
        of_size.check(experimental_tp=experimental_tp)
    for name, number in (("context", context), ("batch", batch), ("chunk", chunk), ("cards", cards)):
        if number is not None:
            COUNT.check(name, number, OptionError)
    if compute is not None:
        COMPUTE.check("compute", compute, OptionError)
    path = find_model(Path(model))
    analysed = analyse_model(path, options)
    builds = tuple(analysed.lowered_for(of_size) for of_size in of_sizes)
    limit = analysed.max_length
    workload = Workload(max_batch_size=batch, max_model_len=context or limit or DEFAULT_LENGTH)
    tensors = weights_of(analysed.source.model)
    dtypes: Counter[str] = Counter()
    for tensor in tensors:
        dtypes[tensor.dtype.numpy().name] += tensor.nbytes
    return ModelPlan(
        model=str(path),
        num_nodes=len(analysed.model.graph),
        num_parameters=sum(tensor.size for tensor in tensors),
        nbytes=sum(tensor.nbytes for tensor in tensors),
        dtypes=dict(dtypes.most_common()),
        state_dtypes=tuple(sorted({value.dtype.numpy().name for value in builds[0].states.values if value.dtype})),
        max_sequence_length=limit,
        workload=workload,
        plans=tuple(
            size_plan(build, workload, chunk=chunk, cards=cards, compute=compute, costs=costs) for build in builds
        ),
        compute=compute,
        missing_kernels=missing_kernels(builds[0]),
        builds=builds,
    )


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


def size_plan(
    build: Build,
    workload: Workload,
    *,
    chunk: int | None = None,
    cards: int | None = None,
    compute: str | None = None,
    costs: bool = False,
) -> SizePlan:
    """The figures of a build, of which nothing is written, for `workload`; see `plan_model` for the rest."""
    tell(f"placing the model on cards, tp {build.plan.mesh.size}")
    model = computing(planned(build), compute)
    deployments = Deployments(model)
    tried = range(1, MOST_CARDS + 1) if cards is None else (cards,)
    workload, fewest = _chunked(deployments, workload, chunk, tried)
    (whole,) = deployments.stages(1, workload)
    tensors = build.lowered.tensors.values()
    weights = {name: loaded_nbytes(tensor, compute) for name, tensor in model.tensors.items()}
    facts_of = functools.cache(functools.partial(facts_at, build, compute=compute))
    least, most = weight_reads(build, workload, weights, facts_of)
    found = [d for n in tried if (d := deployments.on(n, workload)) is not None]
    working, working_chunk = _working(build, workload, facts_of)
    has_cache = whole.kv_nbytes_per_token > 0
    return SizePlan(
        tensor_parallel_size=build.plan.mesh.size,
        weight_nbytes=whole.weight_nbytes,
        replicated_nbytes=sum(weights[t.name] for t in tensors if t.layout and not t.shard_axes),
        padding_nbytes=padding_nbytes(tensors, build.plan.mesh),
        state_nbytes=whole.kv_nbytes_per_token * workload.max_batch_size * workload.max_model_len,
        state_nbytes_per_token=whole.kv_nbytes_per_token,
        activation_nbytes=whole.activation_nbytes,
        working=working,
        working_chunk=working_chunk,
        collectives=tuple(_collectives(model.manifest)),
        choices=explain(build.plan, build.analysis),
        replicated=notes(build.analysis),
        num_blocks=deployments.num_blocks,
        read_nbytes=(least, most),
        floor_us=least / PE_BYTES_PER_S * 1e6,
        prefill_chunk_size=workload.prefill_chunk_size,
        fewest=fewest,
        longest=_longest(deployments, fewest, found, workload) if has_cache else 0,
        deployments=tuple(found),
        rooms=tuple(_rooms(deployments, workload, found, fewest)) if has_cache else (),
        costs=step_costs(build) if costs else None,
    )


def _chunked(
    deployments: Deployments, workload: Workload, chunk: int | None, cards: Sequence[int]
) -> tuple[Workload, Deployment | None]:
    """The workload with the largest chunk with which the fewest cards suffice, and what fits on them."""
    least = deployments.least_cards(workload, cards)
    found = []
    for size in CHUNKS if chunk is None else (chunk,):
        work = dataclasses.replace(workload, prefill_chunk_size=size)
        found.append((work, fewest := deployments.fewest(work, cards)))
        if fewest is not None and fewest.cards == least:
            break
    return min(found, key=lambda pair: math.inf if pair[1] is None else pair[1].cards)


def _working(build: Build, workload: Workload, facts_of: FactsOfStep) -> tuple[WorkingMemory | None, int | None]:
    """What is alive inside a step, and the chunk with which a PE has room for it."""
    first = working = working_memory(build, workload, facts_of)
    smaller = iter([n for n in CHUNKS if n < workload.prefill_chunk_size])
    chunk: int | None = workload.prefill_chunk_size
    while working is not None and working.nbytes > PE_NBYTES:
        if (chunk := next(smaller, None)) is None:
            break
        working = working_memory(build, dataclasses.replace(workload, prefill_chunk_size=chunk), facts_of)
    return first, chunk


def _longest(
    deployments: Deployments, fewest: Deployment | None, found: Sequence[Deployment], workload: Workload
) -> int:
    if fewest is None:
        return deployments.longest(found[-1], workload) if found else 0
    batch = -(-SHOWN_BATCH // fewest.data_parallel_size)
    return deployments.longest(fewest, dataclasses.replace(workload, max_batch_size=batch))


def _rooms(
    deployments: Deployments, workload: Workload, found: Sequence[Deployment], fewest: Deployment | None
) -> Iterator[Room]:
    """For the shown numbers of cards, and contexts from the workload's down to a 64th of it."""
    least = fewest.cards if fewest is not None else None
    cards = [d.cards for d in found if d.cards in SHOWN_CARDS or d.cards == least or len(found) == 1]
    contexts = [length for by in (64, 16, 4, 1) if (length := workload.max_model_len // by) >= 256 or by == 1]
    for number, context in itertools.product(cards, contexts):
        one = dataclasses.replace(workload, max_model_len=context, max_batch_size=1)
        fitting = [(deployments.most_sequences(d, one), d) for d in deployments.all_on(number, one)]
        most, best = max(fitting, key=lambda pair: pair[0], default=(0, None))
        yield Room(
            cards=number,
            context=context,
            pipeline_parallel_size=0 if best is None else best.pipeline_parallel_size,
            data_parallel_size=0 if best is None else best.data_parallel_size,
            sequences=most,
        )


def _collectives(manifest: Manifest) -> Iterator[CollectiveCost]:
    counts = Counter((c.kind, manifest.mesh.parts(c.axes), manifest.payload_nbytes(c)) for c in manifest.collectives)
    for (kind, parts, nbytes), count in sorted(counts.items()):
        yield CollectiveCost(kind=kind, parts=parts, nbytes=nbytes, count=count)
