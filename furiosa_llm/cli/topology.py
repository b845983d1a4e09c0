"""`furiosa-llm topology`: which stage and rank of which replica is on which PE, and what lies in its memory."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from furiosa_llm.cli.command import command
from furiosa_llm.cli.options import ENGINE, PLACEMENT, option, options, working
from furiosa_llm.cli.output import JSON, echo_json
from furiosa_llm.cli.terminal import Console, cell
from furiosa_llm.runtime.artifact.card import PE_NBYTES, PES_PER_CARD
from furiosa_llm.runtime.artifact.units import counted, nbytes
from furiosa_llm.runtime.errors import CapacityError, ContextLengthError
from furiosa_llm.runtime.placement.workload import DEFAULT_LENGTH, Workload

if TYPE_CHECKING:
    from furiosa_llm.runtime.artifact.reader import Artifact
    from furiosa_llm.runtime.placement.capacity import CardMemory, StageMemory
    from furiosa_llm.runtime.placement.stages import Stage
    from furiosa_llm.runtime.placement.topology import Topology


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Report:
    """Everything that is shown. `kv_tokens` is each replica's room, None without a cache; `fault` why none fits."""

    name: str
    topology: Topology
    workload: Workload
    stages: tuple[Stage, ...]
    memory: tuple[StageMemory, ...]
    crossing: tuple[tuple[str, ...], ...]
    received: tuple[int | None, ...]
    """The bytes of `crossing` for one position; None where they are not known."""
    cards: tuple[CardMemory, ...]
    kv_tokens: int | None
    fault: str | None
    hosts: tuple[str, ...] | None = None
    """The host of each card, by its number; None: nobody asked."""


@command()
@click.argument("artifact", type=click.Path(path_type=Path))
@options(ENGINE, *PLACEMENT, "compute")
@option("ray_address", ENGINE, help="Show the host of each card in the Ray cluster there, such as auto.")
@option("max_batch_size", ENGINE, default=1, show_default=True, help="Sequences decoded together.")
@option(
    "max_model_len",
    ENGINE,
    help=f"Tokens that each sequence may reach.  [default: the model's limit, or {DEFAULT_LENGTH}]",
)
@JSON
def topology(
    artifact: Path,
    devices: str | None,
    tensor_parallel_size: int | None,
    pipeline_parallel_size: int | None,
    data_parallel_size: int | None,
    num_blocks_per_pp_stage: tuple[int, ...] | None,
    allow_subset: bool,
    compute: str | None,
    ray_address: str | None,
    max_batch_size: int,
    max_model_len: int | None,
    as_json: bool,
) -> None:
    """Show what lies on which PE when ARTIFACT is loaded on these devices: stages, ranks, replicas, memory.

    Nothing is loaded, and the weights are not read.
    """
    with working():
        from furiosa_llm.runtime.artifact.compute import computing
        from furiosa_llm.runtime.artifact.reader import open_artifact
        from furiosa_llm.runtime.placement.block_reads import block_starts
        from furiosa_llm.runtime.placement.stages import check_tensor_parallel_size, choose_stages
        from furiosa_llm.runtime.placement.topology import make_topology

        opened = computing(open_artifact(artifact, full=False), compute)
        check_tensor_parallel_size(opened, tensor_parallel_size)
        workload = Workload(max_batch_size=max_batch_size, max_model_len=_length(opened, max_model_len))
        stages = choose_stages(
            opened, pipeline_parallel_size=pipeline_parallel_size, num_blocks_per_pp_stage=num_blocks_per_pp_stage
        )
        placed = make_topology(
            opened.manifest.mesh.size,
            pipeline_parallel_size=len(stages),
            data_parallel_size=data_parallel_size,
            devices=devices,
            allow_subset=allow_subset,
            max_pipeline_parallel_size=len(block_starts(opened)),
        )
        report = _report(opened, placed, stages, workload)
        if ray_address is not None:
            from furiosa_llm.runtime.engine.launch import card_hosts

            report = dataclasses.replace(report, hosts=card_hosts(placed, ray_address))
    if as_json:
        echo_json(_to_json(report))
        return
    _show(report)


def show_topology(artifact: Artifact, placed: Topology, stages: tuple[Stage, ...], workload: Workload) -> None:
    """Prints what `furiosa-llm topology` does, of a model that is going to be loaded."""
    _show(_report(artifact, placed, stages, workload))


def _length(artifact: Artifact, asked: int | None) -> int:
    limit = artifact.manifest.model.max_sequence_length
    if asked is not None and limit is not None and asked > limit:
        raise ContextLengthError(f"--max-model-len {asked} is more than the model's limit of {limit} tokens; use less")
    return asked or limit or DEFAULT_LENGTH


def _report(artifact: Artifact, placed: Topology, stages: tuple[Stage, ...], workload: Workload) -> _Report:
    from furiosa_llm.runtime.placement.capacity import (
        card_memory,
        check_weights,
        kv_pages,
        received_nbytes_per_token,
        stage_memory,
    )
    from furiosa_llm.runtime.program.stage_graph import received_values

    crossing = received_values(artifact, [stage.first_node for stage in stages])
    memory = stage_memory(artifact, stages, workload)
    cards = card_memory(placed, memory, workload)
    tokens, fault = None, None
    try:
        check_weights(artifact, placed, stages)
        tokens = kv_pages(placed, memory, page_size=1)
    except CapacityError as error:
        fault = str(error)
    return _Report(
        name=artifact.manifest.model.name,
        topology=placed,
        workload=workload,
        stages=stages,
        memory=memory,
        crossing=crossing,
        received=received_nbytes_per_token(artifact, crossing),
        cards=cards,
        kv_tokens=tokens,
        fault=fault,
    )


# -- for people ----------------------------------------------------------------------------------------------------


def _show(report: _Report) -> None:
    console = Console()
    console.print(cell(_title(report)))
    for table in (_drawing(report), _stages(report), _cards(report)):
        console.print(table, crop=False)
        console.print()
    console.print(cell(_summary(report)))


def _title(report: _Report) -> str:
    return f"{report.name}: {report.topology}"


def _drawing(report: _Report) -> Table:
    """A row for each card, a column for each run of PEs that work as one."""
    size = report.topology.tensor_parallel_size
    table = Table(show_lines=True)
    table.add_column("card")
    for first in range(0, PES_PER_CARD, size):
        table.add_column(f"PE {first}" if size == 1 else f"PEs {first}-{first + size - 1}")
    ranks = "rank 0" if size == 1 else f"ranks 0-{size - 1}"
    cells = {
        group[0]: f"replica {replica}, stage {stage}\n{ranks}"
        for replica, groups in enumerate(report.topology.replicas)
        for stage, group in enumerate(groups)
    }
    for npu in sorted({pe.npu for pe in cells}):
        at = {pe.index: cell for pe, cell in cells.items() if pe.npu == npu}
        where = "" if report.hosts is None else f"\n{report.hosts[npu]}"
        table.add_row(f"npu:{npu}{where}", *(at.get(first, "-") for first in range(0, PES_PER_CARD, size)))
    return table


def _stages(report: _Report) -> Table:
    work = report.workload
    table = Table(
        title=f"one PE of each stage, for {counted(work.max_batch_size, 'sequence')} of {work.max_model_len} tokens; "
        f"reads and receives are of one token",
        title_justify="left",
    )
    table.add_column("stage")
    for name in ("blocks", "reads", "receives", "weights", "KV cache", "activations"):
        table.add_column(name, justify="right")
    whole = sum(stage.cost_nbytes for stage in report.stages)
    for stage, memory, received in zip(report.stages, report.memory, report.received, strict=True):
        last = stage.first_block + stage.num_blocks - 1
        share = f" ({stage.cost_nbytes / whole:.0%})" if whole else ""
        table.add_row(
            str(stage.index),
            f"{stage.first_block}" if stage.num_blocks == 1 else f"{stage.first_block}-{last}",
            f"{nbytes(stage.cost_nbytes)}{share}",
            _nbytes(received) if stage.index else "-",
            nbytes(memory.weight_nbytes),
            nbytes(memory.kv_nbytes_per_token * work.max_batch_size * work.max_model_len),
            _nbytes(memory.activation_nbytes),
        )
    return table


def _nbytes(number: int | None) -> str:
    return "unknown" if number is None else nbytes(number)


def _cards(report: _Report) -> Table:
    table = Table(title="memory of the cards, shared by their PEs", title_justify="left")
    table.add_column("card")
    for name in ("PEs", "weights", "KV cache", "activations", "free", "of", "per PE"):
        table.add_column(name, justify="right")
    for card in report.cards:
        table.add_row(
            f"npu:{card.npu}",
            str(card.num_pes),
            nbytes(card.weight_nbytes),
            nbytes(card.kv_nbytes),
            nbytes(card.activation_nbytes),
            nbytes(card.free_nbytes),
            nbytes(card.capacity_nbytes),
            nbytes(card.free_nbytes / card.num_pes),
        )
    return table


def _summary(report: _Report) -> str:
    if report.fault is not None:
        return f"It does not fit: {report.fault}."
    if report.kv_tokens is None:
        return "The model keeps no KV cache."
    work = report.workload
    wanted = work.max_batch_size * work.max_model_len
    verdict = "It fits" if wanted <= report.kv_tokens else "It does not fit"
    return f"{verdict}: each replica has room for {report.kv_tokens:,} tokens of KV cache, and {wanted:,} are wanted."


# -- for programs --------------------------------------------------------------------------------------------------


def _to_json(report: _Report) -> dict[str, Any]:
    placed = report.topology
    return {
        **placed.as_dict(),
        "pes": [
            {
                "pe": str(pe),
                "replica": replica,
                "stage": stage,
                "rank": rank,
                "host": None if report.hosts is None else report.hosts[pe.npu],
            }
            for replica, groups in enumerate(placed.replicas)
            for stage, group in enumerate(groups)
            for rank, pe in enumerate(group)
        ],
        "workload": dataclasses.asdict(report.workload),
        "stages": [
            {
                **dataclasses.asdict(stage),
                **dataclasses.asdict(memory),
                "received_nbytes_per_token": received,
                "crossing": list(crossing),
            }
            for stage, memory, received, crossing in zip(
                report.stages, report.memory, report.received, report.crossing, strict=True
            )
        ],
        "pe_nbytes": PE_NBYTES,
        "cards": [{**dataclasses.asdict(card), "free_nbytes": card.free_nbytes} for card in report.cards],
        "kv_tokens": report.kv_tokens,
        "fault": report.fault,
        "fits": report.fault is None and all(card.free_nbytes >= 0 for card in report.cards),
    }
