"""A share of the campaign of program mutations, and proof that it finds what it is for."""

from __future__ import annotations

from pathlib import Path

import pytest

from furiosa_llm import verification
from furiosa_llm.parity_options import ParityOptions
from furiosa_llm.runtime.artifact.tools.record import Check
from tests.campaigns import fuzz_verify
from tests.campaigns.fuzz_verify import judge
from tests.support.runtime.mutations import GENAI
from tests.support.runtime.mutations_of_others import kinds

FEW = ParityOptions(seed=5, max_tokens=2, prompts=("hello",), threads=1, max_length=64)

SHARE = {
    "sign of the logits": (False, True, True),
    "negated where a sequence is longer than 24": (False, True, True),
    "scale of a hidden value by 1 %": (False, True, True),
    "the cache written one off": (False, True, True),
    "a sum over the ranks dropped": (True, True, True),
    "negated on one rank": (True, True, True),
    "hidden values cut off at 1000": (False, True, False),
    "a weight altered in its last bit": (False, True, False),
}
"""Whether the proof, the default and the outputs alone find a kind."""


def test_there_are_many_kinds() -> None:
    assert len(kinds()) >= 100
    assert all(kind.models for kind in kinds().values())


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARE)
def test_a_mutation_is_found(name: str, tmp_path: Path) -> None:
    result = judge(kinds()[name], GENAI, tmp_path / "artifact", FEW)
    assert (result.by_proof, result.by_default, result.by_outputs) == SHARE[name]
    assert not result.by_reader


def test_what_nobody_finds_is_a_finding(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Without the comparison with the source, a change below the tolerance is not seen."""
    monkeypatch.setattr(verification, "check_lowering", lambda _: Check(name="lowering", checked=1))
    monkeypatch.setattr("sys.argv", ["fuzz_verify", "--kind", "scale of the logits by 1e-6", "--seed", "1"])
    assert fuzz_verify.main() == 1
    assert capsys.readouterr().out.endswith("1 kinds, 1 artifacts; 1 findings\n")
