"""A small campaign of hostile clients finds nothing, and would see what it looks for."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tests.campaigns.server_attacks import judge, mutated
from tests.campaigns.server_campaign import campaign, expected_of
from tests.campaigns.server_load import slope_of, write_expected

ERROR = b'{"error":{"message":"m"}}'


@pytest.mark.slow
def test_hostile_clients_beside_honest_ones(artifact: Path) -> None:
    result = campaign(artifact, count=12, seed=0)
    assert result.problems == []
    assert dict(result.attacks) == {"disconnect": 12, "malformed": 12, "giant": 12, "slow": 12}
    assert result.honest > 16


@pytest.mark.slow
def test_a_completion_that_is_another_one_is_noticed(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = expected_of(artifact)
    [first, *_] = expected
    wrong = {**expected, first: (expected[first][0] + "!", expected[first][1])}
    monkeypatch.setattr("tests.campaigns.server_campaign.expected_of", lambda _: wrong)
    problems = campaign(artifact, count=1, seed=0).problems
    assert problems
    assert {problem.partition(" gave ")[0] for problem in problems} == {repr(first)}


def answer(status: int, body: bytes) -> bytes:
    return b"HTTP/1.1 %d X\r\n\r\n" % status + body


@pytest.mark.parametrize(
    ("found", "problem"),
    [
        (b"", None),
        (answer(200, b"{}"), None),
        (answer(400, ERROR), None),
        (answer(404, ERROR) + answer(400, ERROR), None),
        (answer(500, ERROR), "the status 500"),
        (answer(404, ERROR) + answer(500, ERROR), "the status 500"),
        (answer(400, b'{"detail": "x"}'), "the answer {'detail': 'x'}"),
    ],
)
def test_answers_to_what_is_malformed_are_judged(found: bytes, problem: str | None) -> None:
    said = judge(found, broken=b"x")
    assert said == problem or (said is not None and problem is not None and said.startswith(problem))


def test_requests_are_mutated_in_many_ways() -> None:
    whole = b"POST / HTTP/1.1\r\nHost: x\r\n\r\n{}"
    rng = random.Random(0)
    assert len({mutated(whole, rng) for _ in range(200)} - {whole}) > 190


def test_slopes_are_of_the_second_half() -> None:
    flat = [(float(second), 100.0) for second in range(60)]
    assert slope_of([(second, 10.0 * second) for second, _ in flat[:30]] + flat[30:]) == pytest.approx(0, abs=1e-6)
    assert slope_of([(second, size + 2 * second) for second, size in flat]) == pytest.approx(120)


def test_what_the_load_compares_with(artifact: Path, tmp_path: Path) -> None:
    write_expected(artifact, tmp_path / "expected.json")
    written = json.loads((tmp_path / "expected.json").read_text())
    assert written["model"] == "tiny-llama-optimum"
    assert len(written["expected"]) == 16
    assert all(written["expected"].values())
