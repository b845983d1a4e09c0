"""How long work may take, on a busy machine too."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

import pytest

from furiosa_llm.runtime.errors import ExecutionError, StepTimeoutError
from furiosa_llm.runtime.program import interruption as module
from furiosa_llm.runtime.program.interruption import Allowance, Interruption, ended_after


@dataclass
class Times:
    """What the clock and the processor say."""

    clock: float = 100.0
    processor: float = 5.0

    def monotonic(self) -> float:
        return self.clock

    def process_time(self) -> float:
        return self.processor


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> Times:
    made = Times()
    monkeypatch.setattr(module, "time", made)
    return made


@pytest.mark.parametrize(
    ("clock", "processor", "left"),
    [
        (3, 3, 5),
        (8, 8, 0),
        (8, 16, 0),  # two threads
        (3, 9, 5),
        (20, 2, 6),  # a busy machine
        (79, 0.5, 1),
        (80, 0.5, 0),  # or one that hangs without work
    ],
)
def test_a_process_that_gets_no_processor_has_more_of_the_clock(
    clock: float, processor: float, left: float, times: Times
) -> None:
    allowance = Allowance(8)
    times.clock += clock
    times.processor += processor
    assert allowance.left() == pytest.approx(left)


def test_who_waits_looks_again(times: Times) -> None:
    asked: list[float] = []

    def done(seconds: float) -> bool:
        asked.append(seconds)
        times.clock += 8
        times.processor += 3
        return False

    assert not Allowance(8).wait(done)
    assert asked == pytest.approx([8, 5, 2])
    assert Allowance(8).wait(lambda _: True)


def test_what_takes_too_long_is_ended() -> None:
    interruption, late = Interruption(), StepTimeoutError("late")
    with interruption.after(0.02, late):
        deadline = time.monotonic() + 20
        while interruption.reason is None and time.monotonic() < deadline:
            pass  # which takes the processor's time
    with pytest.raises(ExecutionError, match="late"):
        interruption.check()
    assert interruption.options.terminate


def test_what_is_done_in_time_is_not() -> None:
    ended = threading.Event()
    with ended_after(60, ended.set):
        pass
    assert not ended.is_set()
