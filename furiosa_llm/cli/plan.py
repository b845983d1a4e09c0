"""`furiosa-llm plan`: what a build would give for each tensor parallel size, why, and what fits on how many cards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.markup import escape
from rich.table import Table

from furiosa_llm.builder.errors import OptionError
from furiosa_llm.cli.build import BUILD, planning_options
from furiosa_llm.cli.command import command
from furiosa_llm.cli.options import ENGINE, PROGRESS, option, working
from furiosa_llm.cli.output import JSON, echo_json
from furiosa_llm.cli.terminal import Console, line
from furiosa_llm.runtime.artifact.progress import tell
from furiosa_llm.runtime.placement.workload import DEFAULT_CHUNK_SIZE, DEFAULT_LENGTH, MOST_CARDS

if TYPE_CHECKING:
    from furiosa_llm.builder.lower.interface import InterfaceValue


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


@command()
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
    "--context",
    type=int,
    help=f"Positions that each sequence may reach.  [default: the model's limit, or {DEFAULT_LENGTH}]",
)
@click.option("--batch", type=int, default=1, show_default=True, help="Sequences that each replica decodes together.")
@click.option(
    "--chunk",
    type=int,
    help=f"New positions in a prefill step.  [default: {DEFAULT_CHUNK_SIZE}, or less where that saves cards]",
)
@click.option("--cards", type=int, help=f"The number of cards.  [default: as few as fit, up to {MOST_CARDS}]")
@option("compute", ENGINE)
@planning_options
@click.option(
    "--emit-onnx", type=click.Path(path_type=Path), help="Write the unsplit model with the plan as ONNX annotations."
)
@option(
    "pipeline_parallel_size", ENGINE, default=1, show_default=True, help="Pipeline stages to annotate with --emit-onnx."
)
@click.option("--explain", is_flag=True, help="Show every figure, what is split and why, and every number of cards.")
@click.option("--roles", "show_roles", is_flag=True, help="Show what each input and output is taken for, and why.")
@JSON
@PROGRESS
def plan(
    model: Path,
    tensor_parallel_size: tuple[int, ...],
    emit_onnx: Path | None,
    pipeline_parallel_size: int,
    fuse_attention: bool,
    explain: bool,
    show_roles: bool,
    as_json: bool,
    progress: bool | None,
    **options: Any,
) -> None:
    """Say on how many cards MODEL (an .onnx file, or its folder) fits, and how it would be partitioned.

    The weights are not read, and their files need not be there. With --emit-onnx attention is not replaced. Exits with
    1 if no size fits.
    """
    if emit_onnx is not None and len(tensor_parallel_size) != 1:
        raise OptionError(
            f"--emit-onnx writes one plan, got the sizes {list(tensor_parallel_size)}; choose one with -tp."
        )
    with working(progress):
        from furiosa_llm.builder.model_plan import plan_model, write_annotated_plan

        planned = plan_model(
            model,
            tensor_parallel_sizes=tensor_parallel_size,
            fuse_attention=fuse_attention and emit_onnx is None,
            costs=as_json,
            **options,
        )
        if emit_onnx is not None:
            tell("writing the annotated model")
            write_annotated_plan(planned.builds[0], emit_onnx, pipeline_parallel_size)
    if as_json:
        echo_json(planned.to_json())
    elif show_roles:
        from furiosa_llm.builder.lower.interface import interface_of

        Console().print(_roles(interface_of(planned.builds[0])), crop=False)
        return
    else:
        console = Console(soft_wrap=True, highlight=False, markup=False)
        for one in planned.shown(explain=explain):
            console.print(one)
        if not explain:
            console.print("\n--explain shows what is split and why, and every number of cards.")
        if planned.missing_kernels and planned.compute is None:
            from furiosa_llm.builder.lower.kernels import described

            line(f"{described(planned.missing_kernels)}.")
    if not any(size.fewest for size in planned.plans):
        click.get_current_context().exit(1)


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
