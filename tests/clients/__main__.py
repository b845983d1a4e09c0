"""Clients of the server as their users run them: `python -m tests.clients`, `make clients`.

Each program `use_*.py` of this folder runs in an environment of its own, under build/clients, with the packages that
it names at its head. It talks to `furiosa-llm serve` of a small random model that says what the program wants
(`tests/support/server/scripted.py`), so that what fails is the client's or the server's doing, and not the model's.
Ends with status 1 if a program failed, or if a server logged an error.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fixtures.synthetic import ensure_synthetic
from furiosa_llm.builder import ArtifactBuilder
from furiosa_llm.example.llama.config import LlamaConfig
from furiosa_llm.example.smollm2.recipe import ensure
from tests.support.server.process import started

HERE = Path(__file__).resolve().parent
ENVIRONMENTS = Path("build/clients")
MODEL = "scripted"
OPTIONS = (
    *("--served-model-name", MODEL, "--chat-template", str(HERE / "template.jinja"), "--max-batch-size", "8"),
    *("--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--reasoning-parser", "qwen3"),
    *("--disable-uvicorn-access-log", "--disable-log-stats"),
)
_CONFIG = LlamaConfig(
    vocab_size=49152,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=16,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    tie_word_embeddings=True,
)
"""What SmolLM2's tokenizer fits, and nearly nothing else: a step takes a millisecond."""
_METADATA = re.compile(r"^# /// script\n((?:#.*\n)+?)# ///$", re.MULTILINE)
_QUIET = ("--quiet", "--quiet", "--disable-pip-version-check")
_FAULT = re.compile(r"ERROR|Traceback|Exception")
_TIMEOUT = 900.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """A program, and what it needs: packages, and of large ones a folder of the wheel alone."""

    program: Path
    packages: Sequence[str]
    folders: Mapping[str, str]

    @property
    def name(self) -> str:
        """What it is called on the command line."""
        return self.program.stem.removeprefix("use_")

    @property
    def environment(self) -> Path:
        """Where its packages are."""
        return ENVIRONMENTS / self.name


def read(program: Path) -> Client:
    """A program with what its head says, as PEP 723 has it."""
    found = _METADATA.search(program.read_text(encoding="utf-8"))
    assert found, f"{program} has no head that names its packages"
    head = tomllib.loads("".join(line[2:] or "\n" for line in found[1].splitlines(keepends=True)))
    return Client(program=program, packages=head["dependencies"], folders=head.get("tool", {}).get("folders", {}))


CLIENTS: Sequence[Client] = [read(program) for program in sorted(HERE.glob("use_*.py"))]


def install(client: Client) -> None:
    """Makes the environment, unless it is there and has the same packages."""
    noted, wanted = client.environment / "installed", "\n".join((*client.packages, *client.folders))
    if noted.exists() and noted.read_text() == wanted:
        return
    shutil.rmtree(client.environment, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(client.environment)], check=True)
    python = str(client.environment / "bin" / "python")
    install = [sys.executable, "-m", "pip", "--python", python, "install", *_QUIET, "--no-compile", *client.packages]
    subprocess.run(install, check=True)
    for package, folder in client.folders.items():
        with tempfile.TemporaryDirectory() as made:
            download = [sys.executable, "-m", "pip", "download", *_QUIET, "--no-deps", "--dest", made, package]
            subprocess.run(download, check=True)
            [wheel] = Path(made).glob("*.whl")
            with zipfile.ZipFile(wheel) as files:
                wanted_files = [name for name in files.namelist() if name.startswith(f"{folder}/")]
                files.extractall(client.environment / "folders", wanted_files)
    noted.write_text(wanted)


def artifact() -> Path:
    """A small random model that has SmolLM2's tokens."""
    folder, model = ENVIRONMENTS / "model-tp4", ENVIRONMENTS / "model"
    if not folder.exists():
        ensure_synthetic(_CONFIG, folder=model)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(ensure("genai-fp32") / name, model)
        ArtifactBuilder(model / "model.onnx", tensor_parallel_size=4).build(folder)
    return folder


def try_client(client: Client, served: Path) -> bool:
    """Runs its program against a server of its own; whether all went well."""
    with tempfile.TemporaryDirectory() as made:
        script = Path(made) / "script"
        script.mkdir()
        program = ("-um", "tests.support.server.scripted", str(script))
        with started(served, *OPTIONS, program=program) as server:
            command = [str(client.environment.absolute() / "bin" / "python"), str(client.program.absolute())]
            # Nothing of what a developer has set may lead a client elsewhere, and nothing is to be fetched.
            env = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
            env |= {"HOME": made, "OPENAI_API_KEY": "none", "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
            env |= {"TOKENIZER": str(served.absolute()), "PYTHONPATH": str(HERE.parents[1])}
            code = subprocess.run(
                [*command, server.url, MODEL, str(script)], env=env, cwd=made, timeout=_TIMEOUT, check=False
            ).returncode
            server.process.send_signal(signal.SIGTERM)
            code = code or server.wait()
        faults = [line for line in server.output.splitlines() if _FAULT.search(line)]
    if faults:
        sys.stdout.write(f"the server says:\n{server.output[-4000:]}\n")
    return not code and not faults


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Run clients against the server, each in its own environment.")
    parser.add_argument("--only", action="append", choices=[client.name for client in CLIENTS], help="repeatable")
    parser.add_argument("--artifact", type=Path, help="of this model instead, which has to have SmolLM2's tokens")
    arguments = parser.parse_args()
    ENVIRONMENTS.mkdir(parents=True, exist_ok=True)
    served, failed = arguments.artifact or artifact(), []
    for client in CLIENTS:
        if arguments.only and client.name not in arguments.only:
            continue
        sys.stdout.write(f"-- {client.name}: {', '.join((*client.packages, *client.folders))}\n")
        sys.stdout.flush()
        install(client)
        begin = time.monotonic()
        if not try_client(client, served):
            failed.append(client.name)
        sys.stdout.write(f"   {time.monotonic() - begin:.0f} s\n")
    sys.stdout.write(f"failed: {', '.join(failed)}\n" if failed else "all clients run\n")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
