"""The guides' commands run, one after the other, where what they are about lies under the names that they use."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from furiosa_llm.example.smollm2.recipe import ensure
from tests.support.adapters import saved
from tests.support.artifacts import ROOT, ZOO, smollm2_artifact
from tests.support.guides import commands

pytestmark = [pytest.mark.release, pytest.mark.real_model]

SHAPE = "int4"
NAMES = {
    "ARTIFACT": "smollm2-tp4.artifact",
    "OUTPUT": "output.artifact",
    "MODEL.onnx": "smollm2/model.onnx",
    "NEW.onnx": "smollm2/model.onnx",
    "MODEL_OR_ARTIFACT": "smollm2-tp4.artifact",
    "A": "smollm2-tp4.artifact",
    "B": "output.artifact",
    "...": "hello",
}
"""What placeholders stand for."""
REFUSED = ["topology", "ARTIFACT", "--devices", "npu:0,npu:1,npu:2,npu:3", "-pp", "2", "-dp", "2"]
"""What the guide shows the error of."""
SECONDS = 1800


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("guides")
    shutil.copytree(ensure(SHAPE), made / "smollm2")
    shutil.copytree(smollm2_artifact(SHAPE, 4), made / "smollm2-tp4.artifact")
    for name, graph in (
        ("llama-3.1-8b", "llama-3.1-8b-dynamo-op21-fp16"),
        ("llama-3.1-70b", "llama-3.1-70b-genai-bf16-cuda"),
    ):
        (made / name).symlink_to(ROOT / "fixtures" / "graphs" / graph)
    shutil.copytree(ZOO / "tiny-llama-optimum", made / "llama")
    for seed, name in enumerate(("sql", "chat", "legal")):
        saved(made / "adapters" / name, {"layers.0.self_attn.q_proj": (64, 64)}, seed=seed)
    for command in (
        ["openssl", "genpkey", "-algorithm", "ed25519", "-out", "key.pem"],
        ["openssl", "pkey", "-in", "key.pem", "-pubout", "-out", "key.pub"],
    ):
        subprocess.run(command, cwd=made, check=True, capture_output=True)
    return made


@pytest.mark.parametrize(
    "guide",
    [
        "adapters",
        "artifact-tools",
        "bench",
        "determinism",
        "example-model",
        "planning",
        "serving",
        "simulation",
        "topology",
    ],
)
def test_commands_run(guide: str, folder: Path) -> None:
    """Those of a server until it listens; those of README, quick start and encoders have tests of their own."""
    for command in commands(ROOT / "docs" / f"{guide}.md"):
        expected = 1 if command == REFUSED else 0
        arguments = [NAMES.get(one, one) for one in command]
        if command[0] in ("build", "reshard", "unbuild"):
            arguments.append("--force")  # the guides have each thing made once, or by turns
        if command[0] == "bench":
            arguments += ["--num-requests", "4", "--input-len", "16", "--output-len", "4"]  # for minutes, not an hour
        (serve if command[0] == "serve" else run)(folder, arguments, expected)


def run(folder: Path, arguments: list[str], expected: int) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "furiosa_llm", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == expected, f"{arguments}\n{done.stdout}\n{done.stderr}"


def serve(folder: Path, arguments: list[str], expected: int) -> None:
    command = [sys.executable, "-um", "furiosa_llm", *arguments, "--host", "127.0.0.1", "--port", "0"]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            if "running on" in line:
                process.send_signal(signal.SIGTERM)
        assert process.wait(SECONDS) == expected, "".join(said)
