"""Which output holds the scores of the next token: the output that ends in a product as wide as the vocabulary."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx_ir as ir

from furiosa_llm.builder.shapes.interface import role_of
from furiosa_llm.builder.shapes.interpreter import Facts

_PRODUCTS = frozenset(
    ("Conv", "Einsum", "FusedMatMul", "Gemm", "MatMul", "MatMulBnb4", "MatMulInteger", "MatMulNBits", "QLinearMatMul")
)
# fmt: off
_BEHIND = frozenset((
    "Add", "Cast", "Clip", "DequantizeLinear", "Div", "Gather", "GatherND", "Identity", "LogSoftmax", "Mul",
    "QuantizeLinear", "Reshape", "Slice", "Softmax", "Squeeze", "Sub", "Tanh", "Transpose", "Unsqueeze", "Where",
))
# fmt: on
"""Ops that may lie between the product and the output."""
_MOST_DIMS = 3
"""Sequences, positions and tokens: scores with one dimension more are of several tokens at each position."""


def find_scores(graph: ir.Graph, facts: Facts, states: Iterable[ir.Value]) -> ir.Value | None:
    """The output that holds next-token scores, if there is one: found by its computation, or by the name `logits`."""
    carried = set(states)
    others = [v for v in graph.outputs if v not in carried and facts[v].dtype.is_floating_point() and facts[v].shape]
    others = [value for value in others if sum(size != 1 for size in facts[value].shape) <= _MOST_DIMS]
    named = next((value for value in others if value.name == "logits"), None)
    widths = list(_tables(graph, facts))
    found = [value for value in others if _is_wide(value, facts, widths)]
    return named if named is not None else next(iter(found), None)


def _is_wide(value: ir.Value, facts: Facts, tables: list[tuple[int, int]]) -> bool:
    """Whether `value` ends in a product about as wide as a token table is long, but not as wide as a hidden state.

    The scores of the tokens may be in any dimension, if they are as many as the table's rows.
    """
    shape, products = facts[value].shape, [facts[product].shape[-2:] for product in _products(value)]
    if any(rows in shape and any(rows in sizes for sizes in products) for rows, _ in tables):
        return True
    last = shape[-1]
    wide = any(last != hidden and 2 * last >= rows for rows, hidden in tables)
    return wide and any(last == sizes[-1] for sizes in products)


def _products(value: ir.Value) -> Iterator[ir.Value]:
    """The outputs of products of which `value` is another form."""
    queue, seen = [value], {value}
    while queue:
        current = queue.pop()
        node = current.producer()
        if node is None:
            continue
        if node.op_type in _PRODUCTS:
            yield current
        elif node.op_type in _BEHIND:
            fresh = [v for v in node.inputs if v is not None and v not in seen]
            seen.update(fresh)
            queue.extend(fresh)


def _tables(graph: ir.Graph, facts: Facts) -> Iterator[tuple[int, int]]:
    """The numbers of rows and the widths of the tables that token ids index."""
    queue = [value for value in graph.inputs if role_of(value) == "token_ids"]
    seen = set(queue)
    while queue:
        for node, port in queue.pop().uses():
            if node.op_type in ("Gather", "GatherBlockQuantized") and port == 1 and node.inputs[0] is not None:
                table = facts[node.inputs[0]].shape
                yield max(table[:1], default=0), facts[node.outputs[0]].shape[-1] if facts[node.outputs[0]].shape else 0
            elif node.op_type == "EmbedLayerNormalization" and node.inputs[2] is not None:
                rows, width = facts[node.inputs[2]].shape
                yield rows, width
            elif node.op_type in _BEHIND | {"Concat", "Expand", "Flatten", "Max", "Min", "Equal", "Less", "Not", "And"}:
                fresh = [output for output in node.outputs if output not in seen]
                seen.update(fresh)
                queue.extend(fresh)
