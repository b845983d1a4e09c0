"""Nothing leaves the machine, and nothing is left in the user's home but which tokenizers have loaded.

Commands run with sockets and look-ups logged.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.support.artifacts import ROOT, ZOO, artifact_of
from tests.support.server.process import started

pytestmark = pytest.mark.slow
MODEL = ZOO / "tiny-llama-optimum" / "model.onnx"
_SUPPRESSING = ("ORT_DISABLE_TELEMETRY", "ORT_RUNNING_UNIT_TESTS", "CI", "GITHUB_ACTIONS", "TF_BUILD", "BUILD_NUMBER")
"""What keeps onnxruntime's telemetry silent where tests run, but not on a user's machine."""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("library") / "log_network.so"
    source = ROOT / "scripts" / "log_network.c"
    subprocess.run(["gcc", "-O2", "-Wall", "-Wextra", "-shared", "-fPIC", "-o", made, source, "-ldl"], check=True)
    return made


@pytest.fixture
def watched(library: Path, tmp_path: Path) -> dict[str, str]:
    """The environment of a process whose network is logged in `tmp_path/network`, with the home `tmp_path/home`."""
    (tmp_path / "home").mkdir()
    (tmp_path / "network").touch()
    kept = {name: value for name, value in os.environ.items() if name not in _SUPPRESSING and "XDG" not in name}
    return {
        **kept,
        "HOME": str(tmp_path / "home"),
        "LD_PRELOAD": str(library),
        "NETWORK_LOG": str(tmp_path / "network"),
    }


def left(folder: Path) -> tuple[str, list[Path]]:
    """What was logged, and the files in the home; not those that docs/limits.md says stay of a tokenizer."""
    tokenizers = folder / "home" / ".cache" / "furiosa-llm-onnx" / "tokenizers"
    files = [path for path in (folder / "home").rglob("*") if path.is_file()]
    others = [one for one in files if one.parent != tokenizers or one.read_text() != one.name]
    return (folder / "network").read_text(), others


def run(program: str, *arguments: object, env: Mapping[str, str]) -> None:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr


def test_the_log_sees_what_it_looks_for(watched: dict[str, str], tmp_path: Path) -> None:
    run(
        "import socket\n"
        "for address in ('name.invalid', 9), ('192.0.2.1', 9), ('127.0.0.1', 9):\n"
        "    try: socket.create_connection(address, timeout=0.1)\n"
        "    except OSError: pass\n",
        env=watched,
    )
    assert left(tmp_path)[0].splitlines() == ["lookup name.invalid", "lookup 192.0.2.1", "connect 192.0.2.1"]


def test_onnxruntime_alone_leaves_an_identifier(watched: dict[str, str], tmp_path: Path) -> None:
    """Where this fails, onnxruntime has changed, and the test below may have lost what it guards against."""
    run(f"import onnxruntime; onnxruntime.InferenceSession({str(MODEL)!r})", env=watched)
    assert "deviceid" in {path.name for path in left(tmp_path)[1]}


def test_commands(watched: dict[str, str], tmp_path: Path) -> None:
    artifact = tmp_path / "artifact"
    short = ("--prompt", "Hello", "--max-tokens", 3)
    commands = [
        ("plan", MODEL),
        ("build", "-tp", 4, MODEL, artifact),
        ("topology", artifact),
        ("verify", artifact, "--against", MODEL, "--max-tokens", 2),
        ("inspect", artifact, "--this-machine"),
        ("generate", artifact, *short),
        ("generate", artifact, *short, "--workers", 2),
        ("bench", artifact, "--num-requests", 2, "--input-len", 4, "--output-len", 4),
        ("reshard", "-tp", 8, artifact, tmp_path / "other"),
        ("unbuild", artifact, tmp_path / "back.onnx"),
    ]
    run(
        "import sys\n"
        "from furiosa_llm.cli.main import cli\n"
        "for command in sys.argv[1:]:\n"
        "    cli(command.split(chr(31)), standalone_mode=False)\n",
        *("\x1f".join(map(str, command)) for command in commands),
        env=watched,
    )
    assert left(tmp_path) == ("", [])


def test_server(watched: dict[str, str], tmp_path: Path) -> None:
    with started(artifact_of("tiny-llama-optimum"), env=watched) as server:
        for path in ("/health", "/", "/machine", "/v1/models"):
            urllib.request.urlopen(server.url + path, timeout=60).close()
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 0
    assert left(tmp_path) == ("", [])
