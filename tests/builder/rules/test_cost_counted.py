"""The FLOPs of standard ops are those that `onnx.reference` does in numpy, counted, or differ for a reason."""

from __future__ import annotations

import dataclasses
import functools
import re

import pytest

from tests.support.builder.costs import SIZES, cost_of_op, facts_of, op_name
from tests.support.builder.counting import counted_flops, values_of
from tests.support.builder.op_cases import CASES
from tests.support.builder.plans import prepare_proto

NOT_RUN = "Scatter|SimplifiedLayerNormalization|GlobalLpPool|GroupNormalization( .*)?|QLinearConv( .*)?|Mean"
NOT_RUN += "|ConvTranspose groups|SwiGLU"
"""`onnx.reference` has no such op, or fails on the case."""
COUNTED = [case for case in CASES if "." not in case.op and not re.fullmatch(NOT_RUN, case.name)]


@dataclasses.dataclass(frozen=True)
class Differs:
    """Cases whose count is not the cost, but `least` to `most` times the cost, and why."""

    cases: str
    least: float
    most: float
    reason: str

    def covers(self, case: str, counted: int, cost: int) -> bool:
        return bool(re.fullmatch(self.cases, case)) and self.least * cost <= counted <= self.most * cost


LOOPS = r"(Range|NonZero|ScatterElements max|BitShift|Hardmax|TopK|ArgMax|ArgMin|AveragePool|MaxPool)( .*)?"
NORMS = r"(LpNormalization|LayerNormalization|RMSNormalization|BatchNormalization|MeanVarianceNormalization)( .*)?"
INTEGERS = r"(MatMulInteger zero points|QLinearMatMul|ConvInteger groups|QuantizeLinear|DynamicQuantizeLinear)( .*)?"
ON_PURPOSE = (
    Differs(LOOPS, 0, 0, "computed by loops over elements, by sorting or by selection: numpy does no arithmetic"),
    Differs("LRN", 0.3, 1, "the sum over neighbours is a loop"),
    Differs(NORMS + "|GlobalAveragePool", 1, 1.2, "what is done once a row or channel does not count"),
    Differs("InstanceNormalization", 1, 1.4, "the deviation is computed twice"),
    Differs("Attention .*", 1, 1.3, "queries and keys are scaled, not scores; a mask of zeros is added"),
    Differs("Gemm .*", 1, 1.2, "the factors of a Gemm are folded into its weights"),
    Differs("Sum", 1, 1.2, "the first sum is broadcast to all of the second"),
    Differs(INTEGERS, 1, 1.35, "zero points of products are folded into sums of weights; saturating is converting"),
    Differs("ConvTranspose", 0.85, 1, "the bias is added by a loop"),
    Differs("Resize to a size", 0.7, 1, "the first dimension is interpolated while the second is small still"),
    Differs("ReduceLogSumExp", 1, 1.25, "infinities are looked for"),
    Differs("Celu|Mish|Softplus|Clip", 0.3, 0.9, "numpy has one function for several (expm1, logaddexp, clip)"),
    Differs("LeakyRelu|Shrink|Sigmoid", 2, 2.5, "both branches are computed, and one is selected"),
)
SELECTS = r"Expand.*|Einsum diagonal|Dropout with a mask|Resize"
"""They cost nothing: numpy multiplies by ones or counts positions."""


@functools.cache
def counted_and_cost(name: str) -> tuple[int, int]:
    case = next(case for case in COUNTED if case.name == name)
    proto = case.model()
    prepared = prepare_proto(proto)
    node = [node for node in proto.graph.node if op_name(node) == case.op][-1]
    counted = counted_flops(proto, node, values_of(proto, prepared.feeds(SIZES)))
    return counted, cost_of_op(prepared.model.graph, facts_of(prepared), case.opset, case.op).flops


@pytest.mark.parametrize("name", [case.name for case in COUNTED if "closure" not in case.name])
def test_the_flops_are_those_that_numpy_does(name: str) -> None:
    counted, cost = counted_and_cost(name)
    if re.fullmatch(SELECTS, name):
        assert cost == 0
    elif counted != cost:
        assert any(differs.covers(name, counted, cost) for differs in ON_PURPOSE), f"counted {counted}, not {cost}"


def test_every_reason_is_needed() -> None:
    """A reason that nothing needs any more would hide the next cost that is wrong."""
    found = [(case.name, *counted_and_cost(case.name)) for case in COUNTED]
    wrong = [row for row in found if row[1] != row[2]]
    assert [differs.cases for differs in ON_PURPOSE if not any(differs.covers(*row) for row in wrong)] == []
    assert len(found) - len(wrong) > 150
