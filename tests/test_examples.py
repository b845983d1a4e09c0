"""Every program in examples/ runs, on a small model; one of them in `make test`."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from furiosa_llm import LLM, SamplingParams
from tests.support.artifacts import artifact_of
from tests.support.server.process import started

EXAMPLES = Path(__file__).parent.parent / "examples"
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"


@pytest.fixture(scope="module")
def artifact() -> Path:
    return artifact_of("tiny-llama-optimum", beside={"chat_template.jinja": TEMPLATE})


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


@pytest.mark.slow
def test_offline_batch(artifact: Path) -> None:
    lines = run("offline_batch.py", artifact, "npu:0:0-3")
    assert [line.partition(" -> ")[0] for line in lines] == [
        "'Hello, my name is'",
        "'The capital of France is'",
        "'Once upon a time'",
    ]


@pytest.mark.slow
def test_chat(artifact: Path) -> None:
    alone, again, other = run("chat.py", artifact)
    assert alone == again
    assert alone != other


@pytest.mark.slow
def test_llm_engine(artifact: Path) -> None:
    lines = run("llm_engine.py", "--model", artifact, "--devices", "npu:0", "--data-parallel-size", 2)
    assert sorted(line[:10] for line in lines) == ["request 0:", "request 1:", "request 2:"]


@pytest.mark.slow
def test_async_llm_engine(artifact: Path) -> None:
    lines = run("async_llm_engine.py", "--model", artifact, "--max-batch-size", 2)
    assert [line.partition(" -> ")[0] for line in lines] == ["'The sun is'", "'Two and two make'", "'Once upon a time'"]


@pytest.mark.slow
def test_parallel(artifact: Path) -> None:
    lines = run("parallel.py", artifact)
    assert lines[:2] == [
        "replica 0: npu:0:0 to npu:0:3 -> npu:1:0 to npu:1:3",
        "replica 1: npu:0:4 to npu:0:7 -> npu:1:4 to npu:1:7",
    ]
    with LLM(artifact) as alone:
        prompts = ["The sun is", "The sea is", "Once upon a time", "Two and two make"]
        outputs = alone.generate(prompts, SamplingParams(temperature=0.0, max_tokens=8))
    assert "\n".join(lines[2:]) == "\n".join(f"{one.prompt!r} -> {one.outputs[0].text!r}" for one in outputs)


@pytest.mark.slow
def test_embeddings(encoder_artifact: Path) -> None:
    same, *others = (line.split()[0] for line in run("embeddings.py", encoder_artifact))
    assert same == "1.000"
    assert [float(cosine) < 1 for cosine in others] == [True, True]


@pytest.mark.slow
def test_stream_generate(artifact: Path) -> None:
    assert "".join(run("stream_generate.py", artifact)).strip()


@pytest.mark.slow
def test_structured_output(artifact: Path) -> None:
    [line] = run("structured_output.py", artifact)
    assert re.fullmatch("(Oslo|Seoul) (yes|no) [0-9]{4}-[0-9]{2}", line)


@pytest.mark.slow
def test_openai_client(artifact: Path) -> None:
    with started(artifact) as server:
        [line] = run("openai_client.py", f"{server.url}/v1", "What is a fjord?")
    with LLM(artifact) as llm:
        messages = [{"role": "user", "content": "What is a fjord?"}]
        [output] = llm.chat(messages, SamplingParams(temperature=0.0, max_tokens=16))
    assert line == output.outputs[0].text
