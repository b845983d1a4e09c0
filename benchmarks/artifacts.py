"""The models and artifacts that the benchmarks run on: built by the command line, in a process of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fixtures.large import write_large
from fixtures.synthetic import ensure_synthetic
from furiosa_llm.example.llama.config import LlamaConfig
from furiosa_llm.example.smollm2.recipe import ensure

FOLDER = Path("build/bench")
SYNTHETIC = "synthetic"
SYNTHETIC_1B = "synthetic-1b"
LARGE_INT4 = "large-int4"
"""Two gigabytes of 4-bit weights, in the widths of Llama 3.1 8B."""
SYNTHETIC_SMALL = "synthetic-small"
SYNTHETIC_TINY = "synthetic-tiny"
"""Whose steps take no time, beside what runs them."""
_SYNTHETIC_CONFIGS = {
    SYNTHETIC: LlamaConfig(
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=16,
        head_dim=64,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        tie_word_embeddings=False,
    ),
    SYNTHETIC_SMALL: LlamaConfig(
        vocab_size=16000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        tie_word_embeddings=False,
    ),
    SYNTHETIC_TINY: LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        tie_word_embeddings=False,
    ),
    SYNTHETIC_1B: LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        tie_word_embeddings=False,
    ),
}
"""Nothing in them needs padding at 4 or 8 PEs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A process that ended well: wall seconds, seconds of its threads on cores, and its peak resident memory."""

    seconds: float
    cpu_seconds: float
    peak_rss_nbytes: int
    output: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltArtifact:
    """An artifact, the model it was built from, and what the build took."""

    folder: Path
    model: Path
    build: Finished


@cache
def model(name: str) -> Path:
    """The .onnx file of SmolLM2 in the shape `name`, or of a synthetic model.

    The large ones are beside their artifacts, and not among what is kept for all checkouts.
    """
    if name == LARGE_INT4:
        folder = FOLDER / f"{name}-model"
        if not (folder / "complete").exists():
            write_large("int4", 2, folder)
            (folder / "complete").touch()
        return folder / "model.onnx"
    config = _SYNTHETIC_CONFIGS.get(name)
    if config is None:
        return ensure(name) / "model.onnx"
    return ensure_synthetic(config, folder=FOLDER / f"{name}-model" if name == SYNTHETIC_1B else None) / "model.onnx"


@cache
def artifact(name: str, tensor_parallel_size: int) -> BuiltArtifact:
    """The artifact of a model, built anew in each run of the benchmarks."""
    folder = FOLDER / f"{name}-tp{tensor_parallel_size}"
    arguments = ["build", "--force", "-tp", str(tensor_parallel_size), str(model(name)), str(folder)]
    command = "import sys; from furiosa_llm.cli.main import main; main()"
    finished = run_measured([sys.executable, "-c", command, *arguments])
    return BuiltArtifact(folder=folder, model=model(name), build=finished)


def stored_weights(built: BuiltArtifact) -> str:
    """For people: the artifact's weights as a multiple of the model's bytes, and how much of them is padding."""
    manifest = json.loads((built.folder / "manifest.json").read_text())
    stored = sum(entry["nbytes"] for entry in manifest["files"] if entry["path"].startswith("weights-"))
    original = sum(file.stat().st_size for file in built.model.parent.glob("model.onnx*"))
    return f"stored weights {stored / original:.2f}x, {manifest['plan']['padding_nbytes'] / 1e6:.0f} MB padding"


def run_measured(command: Sequence[str]) -> Finished:
    """Run a command; raises CalledProcessError with its standard error if it fails."""
    started = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        output, errors = process.stdout.read(), process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, output, errors)
    return Finished(
        seconds=time.monotonic() - started,
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        peak_rss_nbytes=usage.ru_maxrss * 1024,
        output=output,
    )
