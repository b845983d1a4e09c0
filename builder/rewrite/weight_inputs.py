"""Inputs that are used as weights, for instance adapters: every rank is given all of one, and computes with its part.

An Identity after such an input has the rule that its output is computed whole and then cut, so that the product may be
split, as it may be with a stored weight.
"""

from __future__ import annotations

import onnx_ir as ir

from furiosa_llm.builder.rules.elementwise import CUT
from furiosa_llm.builder.rules.facts import Facts
from furiosa_llm.builder.shapes.flow import reached
from furiosa_llm.builder.shapes.roles import role_of
from furiosa_llm.runtime.artifact.adapters.graph import MASKED, ROWS
from furiosa_llm.runtime.artifact.errors import AdapterError

_FORMS = frozenset(("Cast", "Transpose", "Squeeze", "Unsqueeze", "Reshape", "Mul", "Div"))
_SECOND = frozenset(("MatMul", "Gemm", "FusedMatMul", "Einsum"))


def cut_weight_inputs(graph: ir.Graph) -> None:
    """Put an Identity after every input that a product uses as a weight, in place."""
    for value in graph.inputs:
        if role_of(value) != "other" or value.dtype is None or not value.dtype.is_floating_point():
            continue
        if value.shape is None or len(value.shape) < 2 or not _is_weight(value):
            continue
        copy = ir.Node("", "Identity", [value], name=f"{value.name}/part")
        copy.meta[CUT] = True
        own = copy.outputs[0]
        own.name, own.type, own.shape = f"{value.name}/part", value.type, value.shape
        value.replace_all_uses_with(own)
        copy.replace_input_with(0, value)
        graph.insert_before(graph[0], copy)


def check_adapted(graph: ir.Graph, facts: Facts) -> None:
    """Raise AdapterError for a product that got inputs for adapters, and whose rows are not sequences of positions.

    Only of sequences can it be said which adapter is theirs.
    """
    rows = next((facts[value].shape for value in graph.inputs if value.name == ROWS), None)
    for node in graph:
        module, masked, _ = (node.name or "").partition(MASKED)
        if not masked or rows is None or node.inputs[0] is None:
            continue
        shape = facts[node.inputs[0]].shape
        if len(shape) != len(rows) or shape[0] != rows[0]:
            raise AdapterError(
                f"module {module!r:.120} does not multiply [batch, sequence, features], as one that takes adapters has "
                f"to; merge the adapter into the weights, or leave this module out"
            )


def _is_weight(value: ir.Value) -> bool:
    """Whether `value`, perhaps in another form, is the second operand of a product."""

    def changes_its_form(node: ir.Node, port: int) -> bool:
        return node.op_type in _FORMS and (port == 0 or node.op_type == "Mul")

    forms = reached([value], changes_its_form)
    return any(node.op_type in _SECOND and port == 1 for form in forms for node, port in form.uses())
