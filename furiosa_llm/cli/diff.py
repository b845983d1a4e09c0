"""`furiosa-llm diff`: in what two artifacts differ."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from furiosa_llm.cli.command import command
from furiosa_llm.cli.options import working
from furiosa_llm.cli.output import JSON, echo_json
from furiosa_llm.cli.terminal import Console, line
from furiosa_llm.runtime.artifact.errors import FuriosaLLMError
from furiosa_llm.runtime.artifact.progress import tell
from furiosa_llm.runtime.artifact.units import counted

if TYPE_CHECKING:
    from furiosa_llm.runtime.artifact.tools import diff as library
    from furiosa_llm.runtime.artifact.tools.differences import Difference
    from furiosa_llm.runtime.artifact.tools.graph_diff import GraphDiff, Names

_SHOWN = 12
"""Rows of one kind; --json has all of them."""
_TROUBLE = 2

Row = tuple[str, str, str]
"""What, and what it is in A and in B."""


@command()
@click.argument("a", metavar="A", type=click.Path(path_type=Path))
@click.argument("b", metavar="B", type=click.Path(path_type=Path))
@JSON
def diff(a: Path, b: Path, as_json: bool) -> None:
    """Say in what artifact B differs from artifact A: model, provenance, graph, plan, weights and other files.

    Weights are compared by the digests of the originals, so that artifacts for different numbers of PEs compare; those
    that differ are read. Exit code 0 if the artifacts are the same, 1 if they differ, 2 if one cannot be read.
    """
    try:
        with working():
            from furiosa_llm.runtime.artifact.reader import open_artifact
            from furiosa_llm.runtime.artifact.tools import diff as library

            artifacts = [open_artifact(path, full=False) for path in (a, b)]
            tell("comparing")
            found = library.diff(*artifacts)
    except FuriosaLLMError as error:
        error.exit_code = _TROUBLE
        raise
    if as_json:
        echo_json(found.to_json())
    elif found.same:
        line(f"the same artifact: {found.digests[0]}")
    else:
        Console().print(_table(found, str(a), str(b)), crop=False)
    sys.exit(0 if found.same else 1)


def _table(found: library.Diff, a: str, b: str) -> Table:
    table = Table(title="in what the artifacts differ", title_justify="left")
    for column in ("", a, b):
        table.add_column(column, overflow="fold")
    table.add_row("digest", *(f"{digest[:16]}..." for digest in found.digests))
    for section, rows in _sections(found):
        if rows:
            table.add_section()
        for row in rows[:_SHOWN]:
            table.add_row(f"{section}: {row[0]}", *row[1:])
        if len(rows) > _SHOWN:
            table.add_row(f"{section}: {counted(len(rows) - _SHOWN, 'more difference')}, see --json", "", "")
    return table


def _sections(found: library.Diff) -> Iterator[tuple[str, list[Row]]]:
    weights, plan = found.weights, found.plan
    yield "model", [_row(change) for change in found.model]
    yield "provenance", [_row(change) for change in found.provenance]
    yield "node", list(_nodes(found.graph))
    yield "graph input", list(_of_names(found.graph.inputs))
    yield "graph output", list(_of_names(found.graph.outputs))
    yield "graph", [(name, "", "differs") for name in found.graph.other]
    yield "plan", [_row(change) for change in (plan.mesh, *plan.collectives) if change is not None]
    yield "layout", [(change.path, _layouts(change.a), _layouts(change.b)) for change in plan.layouts]
    yield "weight", list(_names(weights.added, weights.removed))
    yield "weight", [_weight(difference) for difference in weights.changed]
    yield "made by the builder", [(name, "", "differs") for name in weights.made]
    yield "file", list(_of_names(found.files))
    yield "manifest", [(name, "", "differs") for name in found.manifest]


def _row(change: library.Change) -> Row:
    return change.path, json.dumps(change.a), json.dumps(change.b)


def _of_names(names: Names) -> Iterator[Row]:
    yield from _names(names.added, names.removed)
    for name in names.changed:
        yield name, "", "differs"


def _names(added: Sequence[str], removed: Sequence[str]) -> Iterator[Row]:
    for name in removed:
        yield name, "is there", "-"
    for name in added:
        yield name, "-", "is there"


def _nodes(graph: GraphDiff) -> Iterator[Row]:
    yield from _names(graph.nodes_added, graph.nodes_removed)
    for change in graph.nodes_changed:
        yield change.name, "", f"differs in {', '.join(change.fields)}"


def _layouts(stored: list[dict[str, Any]]) -> str:
    """How an original is stored, one line for each of its tensors."""
    return "\n".join(map(_layout, stored)) or "in source.onnx"


def _layout(tensor: dict[str, Any]) -> str:
    part = "" if tensor["part"] is None else "{1}..{2} of dimension {0}: ".format(*tensor["part"])
    return f"{part}[{', '.join(map(_dim, tensor['layout']))}]"


def _dim(layout: Any) -> str:
    """A dimension: 176 indices split over mesh axes 0 and 1 are `176/(0,1)`."""
    match layout:
        case {"size": size, "axes": axes}:
            return f"{size}/({','.join(map(str, axes))})"
        case {"prod": parts}:
            return "*".join(
                f"({_dim(part)})" if isinstance(part, dict) and "cat" in part else _dim(part) for part in parts
            )
        case {"cat": parts}:
            return " + ".join(map(_dim, parts))
        case {"prefix": size, "of": part}:
            return f"{size} of ({_dim(part)})"
        case _:
            return str(layout)


def _weight(difference: Difference) -> Row:
    kinds = [f"{dtype} {list(shape)}" for dtype, shape in zip(difference.dtype, difference.shape, strict=True)]
    if difference.num_different is None:
        return difference.name, kinds[0], kinds[1] if kinds[0] != kinds[1] else "differs"
    return (
        difference.name,
        kinds[0],
        f"{counted(difference.num_different, 'element')} differ by up to {difference.greatest:.3g} "
        f"({difference.relative:.1e} of the largest)",
    )
