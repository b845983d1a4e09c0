"""The message of a misfit, for people: dimensions by name, what inputs were taken for, and the options that help."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

import onnx_ir as ir

from furiosa_llm.builder.errors import BuildError, ShapeError
from furiosa_llm.builder.shapes.dimension_names import dimension, names_of_sizes
from furiosa_llm.builder.shapes.interpreter import DATA_DEPENDENT, MisfitError
from furiosa_llm.builder.shapes.roles import inferred_role

Kinds = Mapping[str, tuple[int | str, ...]]

_NUMBER = re.compile(r"(?<![\w.\"/])\d+(?![\w\"]|\.\d)")
_SHOWN = 4
_OF_DATA = (
    " Where the model computes the size, as a mixture that gathers the rows of each expert does, no option helps: "
    "export it so that sizes follow from those of the inputs "
    '(with transformers, set_experts_implementation("batched_mm")).'
)


def explained(error: MisfitError, graph: ir.Graph, kinds: Kinds, again: Callable[[], object]) -> ShapeError:
    """The error without the sizes that were tried; it names the inputs, what they were taken for, and the options.

    `again` meets the same misfit at other sizes, which distinguishes the tried sizes from the model's own.
    """
    message = named(error, kinds, again)
    behind = list(_inputs_behind(error.node, graph))
    taken = "; ".join(_taken(value, kinds) for value in behind[:_SHOWN])
    more = f"; and {len(behind) - _SHOWN} other inputs" if len(behind) > _SHOWN else ""
    advice = _OF_DATA if DATA_DEPENDENT in message else ""
    return ShapeError(
        f"{message} Expected sizes that the model accepts together. It follows from {taken or 'no input'}{more}. Say "
        "what an input is with --role INPUT=ROLE[DIM,...] (for instance --role pos=positions[3,batch,sequence]), a "
        "size with --dim NAME=SIZE (for instance --dim height=224), or a value with --fix INPUT=VALUE "
        "(in Python roles, dims and fixed); `furiosa-llm plan --roles` shows what is inferred."
        f"{advice}"
    )


def named(error: BuildError, kinds: Kinds, again: Callable[[], object]) -> str:
    """The message of an error, with names for the sizes that differ when the error is met `again`, at other sizes."""
    try:
        again()
    except BuildError as found:
        return _named(str(error), str(found), kinds)
    return str(error)


def _named(first: str, second: str, kinds: Kinds) -> str:
    parts, others = _NUMBER.split(first), _NUMBER.split(second)
    if parts != others:
        return first
    names, found = names_of_sizes(kinds), [parts[0]]
    pairs = zip(_NUMBER.findall(first), _NUMBER.findall(second), parts[1:], strict=True)
    for a, b, text in pairs:
        name = dimension((int(a), int(b)), names)
        found += [str(name) if name is not None else "a size that follows from others", text]
    return "".join(found)


def _inputs_behind(node: ir.Node, graph: ir.Graph) -> Iterator[ir.Value]:
    """The graph inputs that an operand of `node` depends on."""
    seen: set[ir.Value] = set()
    stack = [value for value in node.inputs if value is not None]
    while stack:
        value = stack.pop()
        if value in seen:
            continue
        seen.add(value)
        producer = value.producer()
        stack.extend(v for v in (producer.inputs if producer is not None else ()) if v is not None)
    yield from (value for value in graph.inputs if value in seen)


def _taken(value: ir.Value, kinds: Kinds) -> str:
    """An input, its dimensions as the model names them, and what they were taken for."""
    assert value.shape is not None
    symbols = [str(dim) if isinstance(dim, int) or dim.value is not None else "?" for dim in value.shape]
    role = inferred_role(value)
    dims = ", ".join(map(str, kinds[str(value.name)]))
    return f'"{value.name}" [{", ".join(symbols)}], taken for {role.name} [{dims}] ({role.why})'
