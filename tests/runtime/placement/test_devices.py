"""The vendor's device strings: what each names, and what is said of those that name nothing."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from furiosa_llm.runtime.artifact.errors import FuriosaLLMError
from furiosa_llm.runtime.errors import DeviceError
from furiosa_llm.runtime.placement.devices import PE, format_pes, parse_devices


def pes(*places: tuple[int, int]) -> tuple[PE, ...]:
    return tuple(PE(npu=npu, index=index) for npu, index in places)


def card(npu: int) -> tuple[PE, ...]:
    return pes(*((npu, index) for index in range(8)))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("npu:0", card(0)),
        ("npu:0:*", card(0)),
        ("npu:0:0-7", card(0)),
        ("npu:12:3", pes((12, 3))),
        ("npu:0:0-3", pes((0, 0), (0, 1), (0, 2), (0, 3))),
        ("npu:0:6-7", pes((0, 6), (0, 7))),
        ("npu:0:5-5", pes((0, 5))),
        ("npu:1,npu:0", card(0) + card(1)),
        ("npu:1:2, npu:0:7,npu:1:0", pes((0, 7), (1, 0), (1, 2))),
        (" npu : 0 : 4 - 5 ", pes((0, 4), (0, 5))),
        (["npu:1", "npu:0:0, npu:0:1"], pes((0, 0), (0, 1)) + card(1)),
        (("npu:1023:0",), pes((1023, 0))),
    ],
)
def test_what_strings_name(text: str | Sequence[str], named: tuple[PE, ...]) -> None:
    assert parse_devices(text) == named


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Invalid device string: ''; expected npu:0, npu:0:*, npu:0:3 or npu:0:0-3"),
        ("npu:0,", "Invalid device string: ''"),
        ("npu1", "Invalid device string: 'npu1'"),
        ("npu", "Invalid device string: 'npu'"),
        ("npu1:0-7", "Invalid device string: 'npu1:0-7'"),
        ("gpu:0", "Invalid device string: 'gpu:0'"),
        ("NPU:0", "Invalid device string: 'NPU:0'"),
        ("npu:0:0:0", "Invalid device string: 'npu:0:0:0'"),
        ("npu:0 npu:1", "Invalid npu index: 0 npu in 'npu:0 npu:1'"),
        ("cpu", "Invalid device string: 'cpu'; the PEs of npus are simulated"),
        ("cuda:0", "Invalid device string: 'cuda:0'; the PEs of npus are simulated"),
        ([], "Invalid device string: no device in an empty list"),
        (["npu:0", 1], "Invalid device string: 1 is int, not text"),
        ("npu:", "Invalid npu index: "),
        ("npu:x", "Invalid npu index: x in 'npu:x'"),
        ("npu:-1", "Invalid npu index: -1"),
        ("npu:1024", "Invalid npu index: 1024 in 'npu:1024'; cards are numbered from 0 to 1023"),
        ("npu:" + "9" * 5000, "Invalid npu index: 999"),
        ("npu:²", "Invalid npu index: ²"),
        ("npu:0:8", "Invalid pe index: 8 in 'npu:0:8'; a card has 8 PEs, numbered from 0"),
        ("npu:0:", "Invalid pe index: "),
        ("npu:0:-1", "Invalid pe index: -1"),
        ("npu:0:x", "Invalid pe index: x"),
        ("npu:0:0-8", "Invalid pe index: 8"),
        ("npu:0:0-", "Invalid pe index: "),
        ("npu:0:2-5", "Invalid pe index range: 2-5 in 'npu:0:2-5'; a range is of 1, 2, 4 or 8 PEs"),
        ("npu:0:0-2", "Invalid pe index range: 0-2"),
        ("npu:0:3-0", "Invalid pe index range: 3-0"),
        ("npu:0,npu:0:3", "npu:0:3 is given twice, by 'npu:0' and 'npu:0:3'"),
        (["npu:0:0-1", "npu:0:1"], "npu:0:1 is given twice"),
    ],
)
def test_what_is_said_of_the_others(text: str | Sequence[str], message: str) -> None:
    with pytest.raises(DeviceError) as refused:
        parse_devices(text)
    assert message in str(refused.value)
    assert len(str(refused.value)) < 400
    assert isinstance(refused.value, ValueError)
    assert isinstance(refused.value, FuriosaLLMError)


@pytest.mark.parametrize(
    ("text", "shortest"),
    [
        ("npu:0:*", "npu:0"),
        ("npu:1:4-7,npu:1:0-3", "npu:1"),
        ("npu:0:0,npu:0:1,npu:0:2,npu:0:3", "npu:0:0-3"),
        ("npu:0:1,npu:0:2,npu:0:3,npu:0:4", "npu:0:1,npu:0:2-3,npu:0:4"),
        ("npu:1:6,npu:0", "npu:0,npu:1:6"),
    ],
)
def test_the_shortest_string(text: str, shortest: str) -> None:
    assert format_pes(parse_devices(text)) == shortest


@given(st.sets(st.builds(PE, npu=st.integers(0, 4), index=st.integers(0, 7)), min_size=1))
def test_every_set_of_pes_has_a_string(chosen: set[PE]) -> None:
    assert parse_devices(format_pes(chosen)) == tuple(sorted(chosen))
    assert parse_devices([str(pe) for pe in chosen]) == tuple(sorted(chosen))
