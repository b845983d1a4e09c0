"""The table of seeded faults fits the source, and what runs it is not taken in by runs that show nothing."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.seeded_faults import in_artifact, in_builder, in_runtime, in_server
from tests.seeded_faults.__main__ import judge
from tests.seeded_faults.fault import Fault
from tests.seeded_faults.report import Verdict, replace_table, shortfalls, summary
from tests.seeded_faults.running import FAST, NO_JUDGES, REST, ROOT, BrokenRunError, copy_with, run_tests
from tests.seeded_faults.table import FAULTS

_ROW = re.compile(r"^\| ([^|`]+) \| `([^`]+)` \| (.+) \| (?:fast|all) \| `[^`]+` \|$", re.MULTILINE)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_the_text_is_there_once_and_the_change_is_python(fault: Fault) -> None:
    compile(fault.source(ROOT), fault.file, "exec")


def test_hints_are_tests() -> None:
    for fault in FAULTS:
        assert fault.hints, fault.name
        for file, _, test in (hint.partition("::") for hint in fault.hints):
            text = (ROOT / file).read_text(encoding="utf-8")
            assert not test or f"def {test.partition('[')[0]}(" in text, (fault.name, test)


def test_there_are_many_everywhere() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 44
    assert all(len(module.FAULTS) >= 10 for module in (in_artifact, in_builder, in_runtime, in_server))


def test_the_documentation_has_them_all() -> None:
    text = (ROOT / "docs" / "testing.md").read_text(encoding="utf-8")
    assert _ROW.findall(text) == [(fault.name, fault.file, fault.effect) for fault in FAULTS]


# -- the runner ------------------------------------------------------------------------------------------------------

_STUBS = ("furiosa_llm", "furiosa_llm/builder", "furiosa_llm/runtime")
_TESTS = """
import pytest
from furiosa_llm.builder import ANSWER

@pytest.fixture
def answer():
    assert ANSWER
    return ANSWER

def test_it(answer):
    assert answer == 42
"""


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree with a product of one line, and a test of it."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # which takes longer than these tests
    tree = tmp_path / "tree"
    (tree / "tests" / "seeded_faults").mkdir(parents=True)
    shutil.copy(ROOT / "tests" / "seeded_faults" / "inside.py", tree / "tests" / "seeded_faults")
    for stub in _STUBS:
        (tree / stub).mkdir()
        (tree / stub / "__init__.py").write_text("ANSWER = 42\n")
    (tree / "pytest.ini").write_text("[pytest]\nmarkers =\n    real_model\n    slow\n    browser\n")
    (tree / "test_it.py").write_text(_TESTS)
    return tree


def test_what_catches_a_fault_is_a_test_that_fails(tree: Path, tmp_path: Path) -> None:
    one = Fault(name="", file="furiosa_llm/builder/__init__.py", old="42", new="43", effect="", hints=())
    copy_with(one, tree, tmp_path / "copy")
    assert run_tests(tmp_path / "copy", ["test_it.py"], FAST) == ["test_it.py::test_it"]
    assert run_tests(tree, ["test_it.py"], FAST) == []


@pytest.mark.parametrize(("new", "errors"), [("None", "test_it.py::test_it"), ("1 / 0", "test_it.py")])
def test_what_fails_around_a_test_catches_nothing(new: str, errors: str, tree: Path) -> None:
    (tree / "furiosa_llm/builder/__init__.py").write_text(f"ANSWER = {new}\n")
    with pytest.raises(BrokenRunError, match=re.escape(f"errors in ['{errors}']")):
        run_tests(tree, ["test_it.py"], FAST)


def test_a_product_from_elsewhere_is_not_tested(tree: Path) -> None:
    shutil.rmtree(tree / "furiosa_llm")
    with pytest.raises(BrokenRunError, match=r"furiosa_llm is imported from .+, expected from "):
        run_tests(tree, ["test_it.py"], FAST)


def fault(new: str) -> Fault:
    return Fault(name=new, file="source", old="sound", new=new, effect="", hints=("test_hinted.py",))


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool, str]]:
    """The runs that are asked for, of which none takes place: the source, whether tests are named, and the marks."""
    runs: list[tuple[str, bool, str]] = []
    catching = {("hinted", True, FAST), ("fast", False, FAST), ("slow", False, REST)}

    def run(tree: Path, tests: Sequence[str], marks: str, *options: str) -> list[str]:
        source = (tree / "source").read_text()
        if source == "broken":
            raise BrokenRunError("no file")
        runs.append((source, bool(tests), marks))
        return [f"test of {source}"] if runs[-1] in catching else []

    def copy(target: Path) -> None:
        target.mkdir()
        (target / "source").write_text("sound")

    monkeypatch.setattr("tests.seeded_faults.__main__.run_tests", run)
    monkeypatch.setattr("tests.seeded_faults.__main__.copy_of_the_tree", copy)
    return runs


@pytest.mark.parametrize(("suite", "caught"), [("hinted", 1), ("fast", 2), ("all", 3)])
def test_what_hints_do_not_catch_meets_whole_suites(suite: str, caught: int, runs: list[tuple[str, bool, str]]) -> None:
    names = ["hinted", "fast", "slow", "never", "broken"]
    found = judge([fault(name) for name in names], suite, 1)
    assert [one.test for one in found] == [f"test of {name}" if n < caught else None for n, name in enumerate(names)]
    assert [one.is_fast for one in found] == [n < min(caught, 2) for n in range(5)]
    assert [one.broken for one in found] == ["", "", "", "", "no file"]
    sound = [("sound", True, FAST), ("sound", False, FAST), ("sound", False, REST)]
    assert [one for one in runs if one[0] == "sound"] == sound[:caught]


def test_nothing_is_caught_by_tests_that_fail_anyhow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.seeded_faults.__main__.run_tests", lambda *_: ["test_hinted.py::test"])
    monkeypatch.setattr("tests.seeded_faults.__main__.copy_of_the_tree", Path.mkdir)
    with pytest.raises(BrokenRunError, match=r"without a fault fail test_hinted\.py::test"):
        judge([fault("hinted")], "hinted", 1)


def test_the_suites_are_those_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f'-m "{FAST}"' in makefile
    assert all((ROOT / file).is_file() for file in NO_JUDGES)


# -- the report ------------------------------------------------------------------------------------------------------


def verdicts(num_fast: int, num_slow: int, num_broken: int = 0, num_uncaught: int = 0) -> list[Verdict]:
    kinds: list[dict[str, Any]] = [{"test": "t.py::test[a]", "is_fast": True}] * num_fast
    kinds += [{"test": "t.py::test[a]"}] * num_slow + [{"broken": "no file"}] * num_broken + [{}] * num_uncaught
    return [Verdict(fault=fault, seconds=0, **kind) for fault, kind in zip(FAULTS, kinds, strict=False)]


def test_the_bar() -> None:
    assert shortfalls(verdicts(36, 4)) == []
    assert shortfalls(verdicts(35, 5)) == ["the fast suite catches 35 of 40, expected 90%"]
    assert shortfalls(verdicts(38, 0, 1, 1)) == [f"{FAULTS[38].name}: no file", f"{FAULTS[39].name}: no test fails"]
    assert summary(verdicts(36, 3, 1)) == "40 faults: the fast suite catches 36, all tests 39."


def test_the_table_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    file = tmp_path / "testing.md"
    shutil.copy(ROOT / "docs" / "testing.md", file)
    before = file.read_text()
    replace_table(file, verdicts(1, 1))
    found = file.read_text()
    assert [name for name, _, _ in _ROW.findall(found)] == [FAULTS[0].name, FAULTS[1].name]
    assert "| `t.py::test` |" in found
    assert found.split("<!--")[0] == before.split("<!--")[0]
    assert found.split("-->")[-1] == before.split("-->")[-1]
