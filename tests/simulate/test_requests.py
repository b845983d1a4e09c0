"""Loads: drawn with a seed, or read from a trace."""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path

import pytest

from furiosa_llm.simulate.errors import LoadError, TraceError
from furiosa_llm.simulate.requests import Request, drawn, read_trace

GOOD = '{"arrival_time": 5.5, "input_toks": 10, "output_toks": 2, "more": 1}'


def test_a_trace_begins_at_zero_and_is_in_order(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text(GOOD + "\n\n" + GOOD.replace("5.5", "4") + "\n")
    assert read_trace(file) == [
        Request(arrival=0.0, input_len=10, output_len=2),
        Request(arrival=1.5, input_len=10, output_len=2),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "has no request"),
        ("{", "line 1 is not JSON"),
        ("[1]", r"line 1 is \[1\], expected an object"),
        (GOOD.replace("5.5", "NaN"), "arrival_time is nan, expected seconds"),
        (GOOD.replace("5.5", "1" + 400 * "0"), "arrival_time is 1000.*, expected seconds, at most 1e"),
        (GOOD.replace("5.5", "-1e308"), "arrival_time is -1e.308, expected seconds, at most 1e"),
        (100_000 * "[", "line 1 is not JSON"),
        (GOOD.replace("arrival_time", "arrival"), "arrival_time is None, expected seconds"),
        (GOOD.replace("10", "0"), "input_toks is 0, expected a number of tokens"),
        (GOOD.replace("10", "true"), "input_toks is True, expected a number of tokens"),
        (GOOD.replace("2,", "1e3,"), "output_toks is 1000.0, expected a number of tokens"),
    ],
)
def test_what_is_no_trace_is_refused(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text(line)
    with pytest.raises(TraceError, match=message):
        read_trace(file)
    with pytest.raises(TraceError, match="cannot be read"):
        read_trace(tmp_path / "none")
    with pytest.raises(TraceError, match="cannot be read"):
        read_trace(tmp_path / "a\0b")


def test_what_is_no_file_is_not_read() -> None:
    with pytest.raises(TraceError, match="/dev/zero is no file"):
        read_trace(Path("/dev/zero"))  # which has no end


def test_arrivals_are_a_poisson_process() -> None:
    found = drawn(4000, input_len=5, output_len=6, lengths=None, rate=2.0, seed=3)
    gaps = [b.arrival - a.arrival for a, b in itertools.pairwise(found)]
    assert statistics.fmean(gaps) == pytest.approx(0.5, rel=0.05)
    assert statistics.pstdev(gaps) == pytest.approx(0.5, rel=0.07)
    assert found == drawn(4000, input_len=5, output_len=6, lengths=None, rate=2.0, seed=3)
    assert found != drawn(4000, input_len=5, output_len=6, lengths=None, rate=2.0, seed=4)


def test_lengths_are_like_those_of_sharegpt() -> None:
    slow, fast = (drawn(2000, input_len=1, output_len=1, lengths="sharegpt", rate=r, seed=0) for r in (1.0, 9.0))
    assert [(r.input_len, r.output_len) for r in slow] == [(r.input_len, r.output_len) for r in fast]
    assert statistics.fmean(r.input_len for r in slow) == pytest.approx(857, rel=0.05)
    assert statistics.fmean(r.output_len for r in slow) == pytest.approx(652, rel=0.05)
    assert statistics.median(r.input_len for r in slow) == pytest.approx(732, rel=0.05)


def test_loads_that_are_none_are_refused() -> None:
    for count, rate in ((0, 1.0), (1, 0.0), (1, float("nan"))):
        with pytest.raises(LoadError, match="expected"):
            drawn(count, input_len=1, output_len=1, lengths=None, rate=rate, seed=0)
