"""Every command and every program in the README runs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from furiosa_llm.runtime.artifact.reader import open_artifact

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def test_make_targets_run_in_ci() -> None:
    targets = re.findall(r"^make [a-z-]+", "\n".join(blocks("sh")), flags=re.MULTILINE)
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert targets == ["make demo", "make test"]
    assert all(target.removeprefix("make ") in ci for target in targets)


@pytest.mark.real_model
def test_shell_commands() -> None:
    commands = [b for b in blocks("sh") if not b.startswith("make ")]
    assert len(commands) == 1
    script = commands[0].replace(". .venv/bin/activate\n", "")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=ROOT,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("The capital of France is Paris.") == 3
    assert "tp 4 x pp 2 x dp 2 = 16 PEs on npu:0,npu:1" in done.stdout
    assert "verified within 0.0001" in done.stdout
    tour = ROOT / "build" / "tour"
    assert open_artifact(tour / "smollm2-tp8.artifact").manifest.mesh.size == 8
    assert (tour / "smollm2.onnx").is_file()


def test_python_program(tmp_path: Path, zoo: Path) -> None:
    for file in (zoo / "tiny-llama-optimum").iterdir():
        shutil.copy(file, tmp_path)
    (program,) = blocks("python")
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("{'AllReduce': 5, 'AllGather': 1}")
    assert re.search(r"^greedy .", done.stdout, flags=re.MULTILINE)
    assert re.search(r"^random .", done.stdout, flags=re.MULTILINE)
