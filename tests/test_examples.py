"""Every program in examples/ runs, on a small model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from furiosa_llm import ArtifactBuilder

EXAMPLES = Path(__file__).parent.parent / "examples"
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"


@pytest.fixture(scope="module")
def artifact(zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    source = zoo / "tiny-llama-optimum"
    model = folder / "model"
    model.mkdir()
    for file in source.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    (model / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    ArtifactBuilder(model / "model.onnx", tensor_parallel_size=4).build(folder / "artifact")
    return folder / "artifact"


def run(name: str, *arguments: object) -> list[str]:
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_all_are_run_here() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    assert [path.name for path in EXAMPLES.glob("*.py") if f'run("{path.name}"' not in text] == []


def test_offline_batch(artifact: Path) -> None:
    lines = run("offline_batch.py", artifact, "npu:0:0-3")
    assert [line.partition(" -> ")[0] for line in lines] == [
        "'Hello, my name is'",
        "'The capital of France is'",
        "'Once upon a time'",
    ]


def test_chat(artifact: Path) -> None:
    alone, again, other = run("chat.py", artifact)
    assert alone == again
    assert alone != other


def test_llm_engine(artifact: Path) -> None:
    lines = run("llm_engine.py", "--model", artifact, "--devices", "npu:0", "--data-parallel-size", 2)
    assert sorted(line[:10] for line in lines) == ["request 0:", "request 1:", "request 2:"]


def test_async_llm_engine(artifact: Path) -> None:
    lines = run("async_llm_engine.py", "--model", artifact, "--max-batch-size", 2)
    assert [line.partition(" -> ")[0] for line in lines] == ["'The sun is'", "'Two and two make'", "'Once upon a time'"]


def test_stream_generate(artifact: Path) -> None:
    assert "".join(run("stream_generate.py", artifact)).strip()
