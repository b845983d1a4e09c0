"""Look up rows of a table that is split over the ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from furiosa_llm.builder.factors.analysis import NodeInfo
from furiosa_llm.builder.lower.program_builder import ProgramBuilder
from furiosa_llm.builder.plan.outcome import Axes
from furiosa_llm.builder.shapes.interpreter import Facts
from furiosa_llm.runtime.artifact.layout import Dim, global_size, local_size


def emit_lookup(
    program: ProgramBuilder,
    info: NodeInfo,
    axes: Axes,
    table_layout: Sequence[Dim],
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, object],
    facts: Facts,
    output: str,
) -> ir.Value:
    """Emit a Gather whose table is split over `axes` on the axis that is looked up.

    Each rank looks up the rows that it holds and gives zeros for the others, so that the sum over the ranks is the
    result. An index out of the table's range is out of range on every rank, and fails as in the unsplit model.
    """
    node, axis = info.node, info.rule.axis
    assert axis is not None
    name = node.name or output
    here, index = _local_index(program, f"{name}/index", inputs[1], facts, info, axes, table_layout[axis])
    (rows,) = program.node(
        node.op_type, [inputs[0], index, *inputs[2:]], name=f"{name}/rows", domain=node.domain, attributes=attributes
    )
    dtype = facts[node.outputs[0]].dtype
    for _ in range(len(table_layout) - axis - 1):
        here = program.unsqueeze_last(here, name=f"{name}/mask")
    zero = program.constant(np.zeros((), dtype=dtype.numpy()), dtype)
    return program.node("Where", [here, rows, zero], name=f"{name}/here", outputs=[output])[0]


def _local_index(
    program: ProgramBuilder,
    name: str,
    indices: ir.Value | None,
    facts: Facts,
    info: NodeInfo,
    axes: Axes,
    dim: Dim,
) -> tuple[ir.Value, ir.Value]:
    """Whether this rank holds the row, and its local index: 0 for other ranks' rows, out of range for no row at all."""
    source = info.node.inputs[1]
    assert source is not None
    kind = facts[source].dtype
    integer = kind.numpy()
    count, size = local_size(dim, program.mesh), global_size(dim)

    def scalar(number: int) -> ir.Value:
        return program.constant(np.array(number, dtype=integer), kind)

    starts = np.arange(program.mesh.parts(axes), dtype=integer) * count
    offset = program.per_rank(f"first_row/{name}", axes, starts)
    negative = program.one("Less", [indices, scalar(0)], name=f"{name}/is_negative")
    from_end = program.one("Add", [indices, scalar(size)], name=f"{name}/from_end")
    row = program.one("Where", [negative, from_end, indices], name=f"{name}/row")
    local = program.one("Sub", [row, offset], name=f"{name}/local_row")
    above = _at_least(program, local, scalar(0), f"{name}/is_above")
    below = program.one("Less", [local, scalar(count)], name=f"{name}/is_below")
    here = program.one("And", [above, below], name=f"{name}/is_here")
    before = program.one("Less", [row, scalar(0)], name=f"{name}/is_before_all")
    behind = _at_least(program, row, scalar(size), f"{name}/is_behind_all")
    nowhere = program.one("Or", [before, behind], name=f"{name}/is_nowhere")
    local_or_0 = program.one("Where", [here, local, scalar(0)], name=f"{name}/local_row_or_0")
    return here, program.one("Where", [nowhere, scalar(count), local_or_0], name=f"{name}/safe_row")


def _at_least(program: ProgramBuilder, left: ir.Value, right: ir.Value, name: str) -> ir.Value:
    """GreaterOrEqual, written with ops that exist before opset 12."""
    return program.one("Not", [program.one("Less", [left, right], name=f"{name}/not")], name=name)
