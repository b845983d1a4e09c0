"""Every placement that would be right and that a rule does not claim is left out on purpose, with a reason."""

from __future__ import annotations

import dataclasses
import functools
import re

import pytest

from furiosa_llm.builder.rules import OPS
from tests.support.builder.op_cases import CASES
from tests.support.builder.placements import Trial, unclaimed

TRIED = [case for case in CASES if case.runs]


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """Placements that rules do not claim: of which cases, which, and why."""

    cases: str
    placements: str
    reason: str

    def covers(self, case: str, placement: str) -> bool:
        return bool(re.fullmatch(self.cases, case) and re.fullmatch(self.placements, placement))


_SUMS = r"[RP, ]+ -> [RP, ]+"
_PRODUCTS = (
    r"((com\.microsoft\.)?(MatMul|MatMulNBits|MatMulBnb4|MatMulIntegerToFloat|FusedMatMul|TransposeMatMul|QGemm|Gemm"
    r"|Conv|ConvTranspose|Einsum|DequantizeLinear|GatherBlockQuantized|MoE|QMoE))( .*)?"
)
_NORMS = r"(com\.microsoft\.)?(\w*Normalization|GatedRMSNorm|EngramGate)( .*)?"
_FUSED = r"(com\.microsoft\.)?(\w*Attention|GatedDeltaNet|CausalConvWithState|M?RotaryEmbedding)( .*)?"

ON_PURPOSE = (
    LeftOut(
        _PRODUCTS, _SUMS, "a sum is made in front of a product, where it is no larger than behind; weights are none"
    ),
    LeftOut(_NORMS, _SUMS, "linear in scales and biases alone, which are weights and never partial sums"),
    LeftOut(_FUSED, _SUMS, "a sum is made in front of a fused op, which is linear in some of its inputs at best"),
    LeftOut(
        r"OneHot|CastLike( more)?|com\.microsoft\.LinearAttentionGate",
        r"[RP, S0]+ -> [RPS0, ]+",
        "a constant is no sum",
    ),
    LeftOut(r"com\.microsoft\.(GatedAdd|HyperConnection.*)", _SUMS, "bilinear in some inputs, which a rule cannot say"),
    LeftOut(r"Shape.*|Size|EyeLike|NonZero", r"(P|S0) -> [RP]", "what ops make of shapes alone is made on every rank"),
    LeftOut(r"Reshape copied size", r"P, R -> P", "replicated as a whole"),
    LeftOut(r"Dropout with a mask", r"P, R -> P, R", "a mask is no sum"),
    LeftOut(r"Pad an axis", r"P, R, P, R -> P", "what is put around is a constant"),
    LeftOut(
        r"Attention .*", r"R, R, S3(, R)? -> S3", "heads are split instead of their vectors, which caches hold whole"
    ),
    LeftOut(
        r"(com\.microsoft\.)?(RotaryEmbedding|MultiHeadAttention)( .*)?",
        r"(S1|S2), (R|S1), (R|S1)(, [RS2]+)* -> S[12]",
        "positions: dynamic in every decoder, so that no split of them can be planned",
    ),
    LeftOut(r"(\w+Pool|Resize|Upsample)", r"S[23](, R)? -> S[23]", "pixels: windows may cross the cut at other sizes"),
    LeftOut(r"com\.microsoft\..*Attention lengths", r"S0(, [RS0]+)+ -> S0", "lengths in one dimension may be in pairs"),
    LeftOut(
        r"com\.microsoft\.GatherBlockQuantized.*", r"S1, R, S1 -> S2", "the table is split by rows, which is enough"
    ),
    LeftOut(r"com\.microsoft\.MatMulBnb4 short block", r"S0, R, R -> S0", "replicated as a whole"),
    LeftOut(
        r"furiosa_llm\.closure\..*", r"[RPS0, ]+ -> [RPS0, ]+", "what is inside branches and bodies is not followed"
    ),
    LeftOut(r"IsInf|IsNaN|Equal", r"[RPS0, ]+ -> (R|S1)", "by chance: no element is, on any rank"),
    LeftOut(
        r"com\.microsoft\.QLinear(Sigmoid|LeakyRelu|Concat)", r"[RPS01, ]+ -> [RPS01/]+", "by chance: all saturated"
    ),
)


@functools.cache
def missing_of(name: str) -> tuple[str, ...]:
    return tuple(unclaimed(Trial(next(case for case in TRIED if case.name == name))))


@pytest.mark.parametrize("name", [case.name for case in TRIED])
def test_what_a_rule_leaves_out_is_left_out_on_purpose(name: str) -> None:
    assert [found for found in missing_of(name) if not any(left.covers(name, found) for left in ON_PURPOSE)] == []


def test_every_reason_is_needed() -> None:
    """A reason that nothing needs any more would hide the next placement that is forgotten."""
    found = [(case.name, placement) for case in TRIED for placement in missing_of(case.name)]
    assert [left.cases for left in ON_PURPOSE if not any(left.covers(*pair) for pair in found)] == []


@pytest.mark.parametrize(
    ("op", "label", "claim", "lost"),
    [
        ("MatMul", "by a matrix", ("ba m k, k n -> ba m n", "* m k, k n -> * m n"), "S0, R -> S0"),
        ("Relu", "", ("a b -> a b", "* b -> * b"), "S0 -> S0"),
        ("ReduceSum", "", ("; reduce b", "; full b"), "S1, R -> P"),
        ("Gather", "", ("a *, ia -> a ia", "* *, ia -> * ia"), "S0, R -> S0"),
    ],
)
def test_a_forgotten_placement_is_found(
    op: str, label: str, claim: tuple[str, str], lost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = OPS["", op].rule
    assert right is not None
    case = next(case for case in CASES if (case.op, case.name) == (op, f"{op} {label}".strip()))
    assert lost not in unclaimed(Trial(case))
    changed = dataclasses.replace
    forgetful = changed(OPS["", op], rule=lambda view: changed(right(view), text=right(view).text.replace(*claim)))
    monkeypatch.setitem(OPS, ("", op), forgetful)
    assert lost in unclaimed(Trial(case))
