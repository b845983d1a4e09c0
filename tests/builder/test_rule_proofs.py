"""Every rule proved by brute force on simulated ranks, against onnxruntime."""

import pytest

from tests.builder.op_cases import CASES, OpCase
from tests.builder.proofs import prove

UNSPLIT = {
    "NonZero",
    "Conv groups",
    "Slice opset 9",
    "Reshape nothing in common",
    "com.microsoft.RotaryEmbedding one head",
}
"""Cases of which every dimension is demanded whole; what is split before is gathered."""


@pytest.mark.parametrize("case", [case for case in CASES if case.runs], ids=lambda case: case.name)
def test_every_feasible_split_is_right(case: OpCase) -> None:
    proof = prove(case.model())
    assert proof.wrong == ()
    assert proof.plans > 0
