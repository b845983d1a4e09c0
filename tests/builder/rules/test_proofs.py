"""Every rule proved by brute force on simulated ranks, against onnxruntime."""

import re

import pytest

from tests.support.builder.op_case import OpCase
from tests.support.builder.op_cases import CASES
from tests.support.builder.proofs import Proof, prove

BY_THE_INTERFACE = re.compile(r'input ".*" would be split|state ".*" (would come out split otherwise|may hold).*')
"""Splits that these small models refuse, and not the rule: indices are no state, nor is what comes out of Log."""


RUNNING = pytest.mark.parametrize("case", [case for case in CASES if case.runs], ids=lambda case: case.name)


def check(proof: Proof) -> None:
    assert proof.wrong == ()
    assert proof.plans > 0
    assert [reason for reason in proof.refused if not BY_THE_INTERFACE.search(reason)] == []


@RUNNING
def test_a_few_splits_are_right(case: OpCase) -> None:
    """And every dimension that the rule speaks of is split, or its sizes would let a case prove nothing."""
    check(prove(case.model(), most_plans=4))


@pytest.mark.slow
@RUNNING
def test_every_feasible_split_is_right(case: OpCase) -> None:
    check(prove(case.model()))
