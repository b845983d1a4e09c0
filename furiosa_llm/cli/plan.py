"""`furiosa-llm plan`: what a build would give for each tensor parallel size, why, and what fits on how many cards."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from rich.markup import escape
from rich.table import Table

from furiosa_llm.builder import ModelPlan, OptionError, plan_model
from furiosa_llm.builder.lower.interface import InterfaceValue, interface_of
from furiosa_llm.builder.model_plan import CollectiveCost, SizePlan, write_annotated_plan
from furiosa_llm.builder.plan.explain import Explained
from furiosa_llm.cli.build import BUILD, planning_options
from furiosa_llm.cli.options import ENGINE, option
from furiosa_llm.cli.terminal import Console, line
from furiosa_llm.runtime.artifact.card import CARD_NBYTES, PE_NBYTES, PES_PER_CARD
from furiosa_llm.runtime.artifact.units import nbytes
from furiosa_llm.runtime.placement.capacity import DEFAULT_CHUNK_SIZE

_SHOWN_WEIGHTS = 3


class _ParallelSizes(click.ParamType[tuple[int, ...]]):
    """`4,8`."""

    name = "N[,N...]"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        parts = str(value).split(",")
        if not all(part.strip().isdecimal() for part in parts):
            self.fail(f"{value!r} is not a list of sizes, for instance 4,8", param, ctx)
        return tuple(dict.fromkeys(int(part) for part in parts))


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@option(
    "tensor_parallel_size",
    BUILD,
    type=_ParallelSizes(),
    default="4,8",
    show_default=True,
    help="How many PEs share each matrix; several sizes are shown side by side.",
)
@click.option(
    "--context", type=int, help="Positions that each sequence may reach.  [default: 2048 or the model's limit]"
)
@click.option("--batch", type=int, default=1, show_default=True, help="Sequences decoded together.")
@click.option(
    "--chunk", type=int, default=DEFAULT_CHUNK_SIZE, show_default=True, help="New positions in a prefill step."
)
@planning_options
@click.option(
    "--emit-onnx", type=click.Path(path_type=Path), help="Write the unsplit model with the plan as ONNX annotations."
)
@option(
    "pipeline_parallel_size", ENGINE, default=1, show_default=True, help="Pipeline stages to annotate with --emit-onnx."
)
@click.option("--roles", "show_roles", is_flag=True, help="Show what each input and output is taken for, and why.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def plan(
    model: Path,
    tensor_parallel_size: tuple[int, ...],
    emit_onnx: Path | None,
    pipeline_parallel_size: int,
    fuse_attention: bool,
    show_roles: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Say how MODEL (an .onnx file) would be partitioned, what that costs, and where it fits.

    The weights are not read, and their files need not be there. With --emit-onnx attention is not replaced.
    """
    if emit_onnx is not None and len(tensor_parallel_size) != 1:
        raise OptionError(
            f"--emit-onnx writes one plan, got the sizes {list(tensor_parallel_size)}; choose one with -tp."
        )
    planned, builds = plan_model(
        model,
        tensor_parallel_sizes=tensor_parallel_size,
        fuse_attention=fuse_attention and emit_onnx is None,
        **options,
    )
    if emit_onnx is not None:
        write_annotated_plan(builds[0], emit_onnx, pipeline_parallel_size)
    if as_json:
        click.echo(json.dumps(planned.to_json(), indent=2))
        return
    console = Console()
    if show_roles:
        console.print(_roles(interface_of(builds[0])), crop=False)
        return
    console.print(_figures(planned), crop=False)
    for size_plan in planned.plans:
        console.print()
        console.print(_choices(size_plan), crop=False)
    console.print()
    console.print(_deployments(planned), crop=False)
    for size_plan in planned.plans:
        if (size_plan.working_nbytes or 0) > PE_NBYTES:
            line(
                f"tp {size_plan.tensor_parallel_size}: {_known(size_plan.working_nbytes)} are alive inside a step, "
                f"which neither table nor engine counts; choose a smaller chunk or batch."
            )


def _roles(values: Sequence[InterfaceValue]) -> Table:
    """What each input and output is taken for."""
    table = Table(title="inputs and outputs", title_justify="left")
    for column in ("name", "shape", "role", "from"):
        table.add_column(column, overflow="fold")
    for one in values:
        tie = " (a tie that the name broke)" if one.tie else ""
        shape = f"{one.dtype} [{', '.join(map(str, one.shape))}]"
        table.add_row(*map(escape, (one.name, shape, one.role, one.why + tie)))
    return table


def _figures(found: ModelPlan) -> Table:
    """Every size side by side."""
    work = found.workload
    parameters = (
        f"{found.num_parameters / 1e9:.2f} billion" if found.num_parameters > 1e9 else f"{found.num_parameters:,}"
    )
    table = Table(
        title=f"{found.model}: {parameters} parameters, {nbytes(found.nbytes)}, {found.num_nodes} nodes; "
        f"context {work.max_model_len}, batch {work.max_batch_size}, prefill by {work.prefill_chunk_size}",
        title_justify="left",
    )
    table.add_column("one PE of tp")
    for plan_ in found.plans:
        table.add_column(str(plan_.tensor_parallel_size), justify="right")
    rows: list[tuple[str, Callable[[SizePlan], str]]] = [
        ("weights", lambda p: f"{nbytes(p.weight_nbytes)} ({p.weight_nbytes / max(found.nbytes, 1):.1%})"),
        ("  of them on every PE alike", lambda p: nbytes(p.replicated_nbytes)),
        ("  padding, all PEs together", lambda p: nbytes(p.padding_nbytes)),
        ("KV cache", lambda p: f"{nbytes(p.state_nbytes)} ({nbytes(p.state_nbytes_per_token)} a position)"),
        ("activations", lambda p: _known(p.activation_nbytes)),
        ("most alive inside a step", lambda p: _known(p.working_nbytes)),
        ("all of it", lambda p: f"{nbytes(_all_nbytes(p))} of {nbytes(PE_NBYTES)}"),
        ("collectives per token", lambda p: "\n".join(map(_collective, p.collectives)) or "none"),
        ("reading the weights once", lambda p: f"{p.floor_us / 1000:.2f} ms"),
        ("blocks (pp is at most)", lambda p: str(p.num_blocks)),
    ]
    for name, text in rows:
        table.add_row(name, *(text(plan_) for plan_ in found.plans))
    return table


def _known(count: int | None) -> str:
    return "unknown" if count is None else nbytes(count)


def _all_nbytes(plan_: SizePlan) -> int:
    return plan_.weight_nbytes + plan_.state_nbytes + (plan_.activation_nbytes or 0)


def _collective(cost: CollectiveCost) -> str:
    return f"{cost.count} {cost.kind} over {cost.parts}, {nbytes(cost.nbytes)} each"


def _choices(plan_: SizePlan) -> Table:
    """Every group of dimensions: what, how and why."""
    size = plan_.tensor_parallel_size
    table = Table(title=f"tp {size}: what is split, and why", title_justify="left", show_lines=True)
    for name in ("dimension", "split", "why, and what was not taken"):
        table.add_column(name, overflow="fold")
    for choice in plan_.choices:
        table.add_row(_what(choice), _split(choice), _why(choice))
    for note in plan_.replicated:
        table.add_row("ops", "on every PE", note)
    return table


def _what(choice: Explained) -> str:
    shown = ", ".join(choice.weights[:_SHOWN_WEIGHTS])
    more = len(choice.weights) - _SHOWN_WEIGHTS
    names = f"{shown} and {more} more" if more > 0 else shown
    return f"{choice.role}: {choice.size} ({choice.count}x)\n{nbytes(choice.nbytes)}: {names}"


def _split(choice: Explained) -> str:
    if not choice.axes:
        return "whole"
    axes = ",".join(map(str, choice.axes))
    padded = f"\npadded to {choice.padded_size}" if choice.padded_size != choice.size else ""
    return f"over {choice.parts} PEs\n(mesh axes {axes}){padded}"


def _why(choice: Explained) -> str:
    lines = [choice.why]
    if choice.replicated_nbytes:
        lines.append(f"more than an even share of these weights: +{nbytes(choice.replicated_nbytes)} per PE")
    if choice.padding_nbytes:
        lines.append(f"padding: +{nbytes(choice.padding_nbytes)} per PE")
    refused: dict[str, list[int]] = {}
    for other in choice.alternatives:
        if other.parts > choice.parts:
            refused.setdefault(other.reason, []).append(other.parts)
    lines += [f"not over {', '.join(map(str, parts))}: {reason}" for reason, parts in refused.items()]
    return "\n".join(lines)


def _deployments(found: ModelPlan) -> Table:
    """What fits on how many cards."""
    table = Table(
        title=f"where it fits (RNGD: {PES_PER_CARD} PEs and {CARD_NBYTES // 10**9} GB a card)", title_justify="left"
    )
    for name in ("cards", "tp", "pp", "dp", "fullest PE", "fits", "room for more KV positions, each replica"):
        table.add_column(name, justify="right")
    for plan_ in found.plans:
        for d in plan_.deployments:
            over = "" if d.fits else f"no, {nbytes(d.pe_nbytes - PE_NBYTES)} too much"
            table.add_row(
                str(d.cards),
                str(plan_.tensor_parallel_size),
                str(d.pipeline_parallel_size),
                str(d.data_parallel_size),
                nbytes(d.pe_nbytes),
                "yes" if d.fits else over,
                f"{d.free_tokens:,}",
            )
        table.add_section()
    return table
