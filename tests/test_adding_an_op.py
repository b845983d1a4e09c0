"""docs/adding-an-op.md tells the truth: its code is in the tree, its commands run, its error is what is said."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from furiosa_llm.builder.errors import UnsupportedModelError
from furiosa_llm.builder.rules import OPS
from furiosa_llm.builder.rules.registry import Op
from tests.support.builder.op_cases import CASES
from tests.support.builder.plans import prepare_proto

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "adding-an-op.md").read_text(encoding="utf-8")
OP = "com.microsoft", "EngramGate"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, flags=re.DOTALL | re.MULTILINE)


def test_the_code_is_in_the_tree() -> None:
    *entry, row = blocks("python")
    file = (ROOT / "builder" / "rules" / "hyper_connections.py").read_text(encoding="utf-8")
    assert len(entry) == 3
    assert all(code in file for code in entry)
    assert row in (ROOT / "tests" / "support" / "builder" / "op_cases_fused.py").read_text(encoding="utf-8")


def test_without_the_entry_a_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    (message,) = blocks("text")
    model = next(case for case in CASES if case.op == ".".join(OP)).model()
    prepare_proto(model)
    monkeypatch.delitem(OPS, OP)
    with pytest.raises(UnsupportedModelError, match=re.escape(message.strip())):
        prepare_proto(model)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(3))
def test_the_commands_run(number: int) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", blocks("sh")[number]],
        cwd=ROOT,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert ("CPUExecutionProvider" if number == 0 else " passed") in done.stdout


def test_the_table_names_every_field() -> None:
    table = TEXT.rpartition("## What an entry may say")[2]
    assert set(Op.__dataclass_fields__) <= set(re.findall(r"`(\w+)`", table))
