"""What holds of the cost of any op."""

from __future__ import annotations

import pytest

from furiosa_llm.builder.rules import OPS
from furiosa_llm.builder.rules.cost import Cost
from furiosa_llm.builder.rules.registry import cost_of
from furiosa_llm.builder.rules.view import NodeView
from tests.support.builder.costs import facts_of, views_in
from tests.support.builder.op_case import OpCase, case
from tests.support.builder.op_cases import CASES
from tests.support.builder.plans import prepare_proto


def test_every_op_has_a_cost() -> None:
    refused = {name for name, op in OPS.items() if op.remedy or op.random}
    assert {name for name, op in OPS.items() if op.cost is None} == refused


VIEWED = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "ExpandDims", "Identity", "Dropout", "BitCast")
"""They write nothing, but for a mask."""
IN_PLACE = (
    "TensorScatter",
    "Attention",
    "QAttention",
    "GroupQueryAttention",
    "MultiHeadAttention",
    "DecoderMaskedMultiHeadAttention",
)
"""They write new positions to their caches."""
BODIES = ("If", "Loop", "Scan")


@pytest.mark.parametrize("made", CASES, ids=lambda made: made.name)
def test_a_node_reads_at_most_its_inputs_and_writes_its_outputs(made: OpCase) -> None:
    for view in views_in(made):
        found, facts = cost_of(view), view.facts
        assert min(found.flops, found.nbytes_read, found.nbytes_written) >= 0
        if view.node.op_type in BODIES:
            continue
        outputs = sum(facts[value].nbytes for value in view.node.outputs if value.name)
        assert found.nbytes_read <= sum(facts[value].nbytes for value in view.node.inputs if value is not None)
        if view.node.op_type in (*VIEWED, *IN_PLACE):
            assert found.nbytes_written <= outputs
        else:
            assert found.nbytes_written == outputs


def test_an_op_without_an_entry_reads_and_writes_what_it_has() -> None:
    prepared = prepare_proto(case("X", "", "float[6] past_x", "float[6] y", "y = Exp(past_x)").model())
    facts = facts_of(prepared)
    (node,) = prepared.model.graph
    node.domain = "someone.else"
    assert cost_of(NodeView(node, facts, facts, 21)) == Cost(nbytes_read=24, nbytes_written=24)
