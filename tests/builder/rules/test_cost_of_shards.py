"""What the ranks of a split model compute together: all of the unsplit model, and no more where an op is split."""

from __future__ import annotations

import functools
import re
from fractions import Fraction

import pytest

from furiosa_llm.builder.plan.outcome import InfeasibleError
from furiosa_llm.builder.plan.sweep import Sweeper
from furiosa_llm.runtime.artifact.layout import Mesh
from tests.support.builder.costs import cost_of_op, cost_on_a_rank, facts_of
from tests.support.builder.op_cases import CASES
from tests.support.builder.plans import prepare_proto

RANKS = 2
ON_EVERY_RANK = {
    r"Gemm .*|(com\.microsoft\.)?(MatMulIntegerToFloat|QGemm|Conv|ConvTranspose|MatMulNBits)( .*)?": "a bias",
    r"ConvInteger groups": "the padding of channels of a group",
    r"ReduceMean.*": "the quotient",
    r"com\.microsoft\.Q?MoE.*": "the routing, and what is added up for each token",
    r"com\.microsoft\.GroupQueryAttention (packed|sinks)": "key heads, where query heads that share one are split",
    r"(com\.microsoft\.)?(LinearAttention|GatedDeltaNet).*": "states, where query heads that share one are split",
    r"com\.microsoft\.MatMulNBits.*|DequantizeLinear short block.*|com\.microsoft\.QLinearConcat": "parts of blocks",
}
"""What all ranks compute of an op that is split, by the names of cases."""


@functools.cache
def ratios(name: str) -> list[tuple[Fraction, Fraction]]:
    """For each leaf that is split: the FLOPs of all ranks by the unsplit ones, its size with padding by its own."""
    made = next(case for case in CASES if case.name == name)
    prepared, mesh = prepare_proto(made.model()), Mesh((RANKS,))
    whole = cost_of_op(prepared.model.graph, facts_of(prepared), made.opset, made.op).flops
    leaves = prepared.static_leaves()
    sweeper = Sweeper(prepared.analysis, mesh, leaves, prepared.states)
    found = []
    for leaf in leaves if whole else ():
        try:
            outcome = sweeper.sweep({leaf: (0,)})
        except InfeasibleError:
            continue
        local = cost_on_a_rank(prepared, mesh, {leaf: (0,)}, outcome, made.opset, made.op).flops
        found.append((Fraction(RANKS * local, whole), Fraction(-(-leaf.size // RANKS) * RANKS, leaf.size)))
    return found


@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_ranks_compute_all_of_an_op_and_no_more_where_it_is_split(name: str) -> None:
    for together, padded in ratios(name):
        assert 1 <= together <= RANKS
        if together not in (padded, RANKS):
            assert any(re.fullmatch(cases, name) for cases in ON_EVERY_RANK), (together, padded)


@pytest.mark.parametrize("cases", ON_EVERY_RANK)
def test_every_reason_is_needed(cases: str) -> None:
    matching = [case.name for case in CASES if re.fullmatch(cases, case.name)]
    assert any(together not in (padded, RANKS) for name in matching for together, padded in ratios(name))


ALIKE_ON_ALL = {
    "DynamicQuantizeLinear": "one scale over all elements",
    "NonZero": "positions",
    "Range": "positions",
    "com.microsoft.GatherBlockQuantized": "rows are looked up on every rank, and one rank has each",
    "furiosa_llm.closure.Loop": "nothing inside is split",
    "furiosa_llm.closure.Scan": "nothing inside is split",
}


def test_every_op_that_computes_and_has_a_rule_is_split_exactly_by_some_case() -> None:
    found = [(case.op, pair) for case in CASES for pair in ratios(case.name)]
    split = {op for op, (together, padded) in found if together == padded}
    assert sorted({op for op, _ in found} - split) == sorted(ALIKE_ON_ALL)
