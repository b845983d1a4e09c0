"""Progress reaches who waits: in lines where that was asked, by a bar on a terminal, and else nobody."""

from __future__ import annotations

import io
import sys
import threading
import time
from collections.abc import Callable

import pytest

from furiosa_llm.runtime.artifact.progress import shown, tell, telling, told

Step = tuple[str, int, int]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Moves the time on."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def advance(seconds: float) -> None:
        now[0] += seconds

    return advance


def test_lines(capsys: pytest.CaptureFixture[str], clock: Callable[[float], None]) -> None:
    with shown(True):
        tell("plan")
        tell("[bold]", 0, 3)
        tell("[bold]", 1, 3)
        clock(1.0)
        tell("[bold]", 2, 3)
        tell("write", 0, 5_000_000)
        clock(2.0)
        tell("write", 3_000_000, 5_000_000)
    assert capsys.readouterr() == (
        "",
        "choosing what to split\n[bold]: 0 of 3\n[bold]: 2 of 3\n"
        "writing weights: 0 B of 5.0 MB, 0 B/s\nwriting weights: 3.0 MB of 5.0 MB, 1.5 MB/s\n",
    )


def test_lines_go_on_while_one_thing_takes_long(capsys: pytest.CaptureFixture[str]) -> None:
    with shown(True):
        tell("comparing", 6, 24)
        time.sleep(1.0)
    assert capsys.readouterr().err == "comparing: 6 of 24\ncomparing: 6 of 24, 1 s\n"


def test_nothing_where_nobody_is_to_be_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with shown(False), shown():
        tell("plan")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("asked", [None, False])
def test_nothing_where_nobody_looks(asked: bool | None, capsys: pytest.CaptureFixture[str]) -> None:
    with shown(asked):
        tell("plan")
    tell("plan")
    assert capsys.readouterr() == ("", "")


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with shown():
        tell("loading the weights", 3, 8)
    assert "loading the weights" in terminal.getvalue()
    assert "3 of 8" in terminal.getvalue()


def test_a_callable_and_what_is_told_already_stays(capsys: pytest.CaptureFixture[str]) -> None:
    steps: list[Step] = []
    with telling(lambda *step: steps.append(step)), shown(True):
        tell("plan")
    with shown(lambda *step: steps.append(step)):
        tell("lower", 1, 2)
    assert steps == [("plan", 0, 1), ("lower", 1, 2)]
    assert capsys.readouterr().err == ""


def test_threads_tell_whom_their_maker_asked_for() -> None:
    steps: list[Step] = []
    with telling(lambda *step: steps.append(step)):
        report = told()

        def work() -> None:
            tell("to nobody")
            report("to the maker", 0, 1)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert steps == [("to the maker", 0, 1)]
