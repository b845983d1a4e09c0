"""The recipe: which files make a finished model of each shape, and how each is written."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import onnx
import rich.console

from furiosa_llm.example.cache import Step, build_folder, is_complete
from furiosa_llm.example.llama.configs import CONFIG_FILES, GENAI_CONFIG_FILES, write_configs, write_json
from furiosa_llm.example.llama.genai import write_genai_graph
from furiosa_llm.example.llama.onnx_writer import DATA, MODEL, ModelWriter, write_model_files
from furiosa_llm.example.llama.optimum import write_optimum_graph
from furiosa_llm.example.llama.projection import DenseProjection
from furiosa_llm.example.smollm2 import SHAPES
from furiosa_llm.example.smollm2.gguf_weights import GgufWeights
from furiosa_llm.example.smollm2.int4 import Int4Projection
from furiosa_llm.example.smollm2.source import GGUF_NAME, GGUF_SHA256, fetch_gguf
from furiosa_llm.example.smollm2.tokenizer import (
    build_tokenizer,
    chat_template,
    original_chat_template,
    special_tokens,
    tokenizer_config,
)
from furiosa_llm.runtime.artifact.cache import cache_home
from furiosa_llm.runtime.artifact.console import Console

RECIPE = "2"
"""Version of what this folder writes: raise it with any change of a written file, and cached models are built anew."""

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.original.jinja",
)


def _genai_fp32(writer: ModelWriter, source: GgufWeights) -> onnx.ModelProto:
    return write_genai_graph(writer, source, DenseProjection(source))


def _int4(writer: ModelWriter, source: GgufWeights) -> onnx.ModelProto:
    return write_genai_graph(writer, source, Int4Projection(source))


_GRAPHS: dict[str, Callable[[ModelWriter, GgufWeights], onnx.ModelProto]] = dict(
    zip(SHAPES, (_genai_fp32, write_optimum_graph, _int4), strict=True)
)


def default_folder() -> Path:
    """Where the models lie unless told otherwise, one folder per shape in it."""
    return cache_home() / "smollm2-135m-instruct"


def ensure(shape: str, cache_dir: Path | None = None, *, console: rich.console.Console | None = None) -> Path:
    """The folder of SmolLM2-135M-Instruct as ONNX in the given shape; builds what is missing.

    Args:
        shape: one of `SHAPES`.
        cache_dir: the folder to hold one folder per shape; `default_folder()` by default.
        console: where progress is shown; standard error by default.

    Raises:
        ValueError: an unknown shape.
        ExampleModelError: the download, the file's checksum or the disk failed; the message says which and what to do.
    """
    if shape not in _GRAPHS:
        raise ValueError(f"unknown shape {shape!r}; choose one of {', '.join(SHAPES)}")
    root = cache_dir or default_folder()
    folder = root / shape
    recipe = f"{RECIPE} {shape}"
    if not is_complete(folder, recipe):
        shown = console or Console(stderr=True)
        build_folder(folder, recipe, _model_steps(shape, ensure_gguf(root, console=shown)), shown)
    return folder


def ensure_gguf(cache_dir: Path | None = None, *, console: rich.console.Console | None = None) -> Path:
    """The GGUF file under `cache_dir/source`, downloaded once (93 MB); arguments and errors as for `ensure`."""
    folder = (cache_dir or default_folder()) / "source"
    if not is_complete(folder, GGUF_SHA256):
        step = Step(name="download", files=(GGUF_NAME,), write=fetch_gguf)
        build_folder(folder, GGUF_SHA256, [step], console or Console(stderr=True))
    return folder / GGUF_NAME


def _model_steps(shape: str, gguf_path: Path) -> list[Step]:
    genai = shape != "optimum-fp32"

    @cache
    def source() -> GgufWeights:
        return GgufWeights(gguf_path)  # parsing the vocabulary takes seconds: only when a step is to run, and once

    def write_configuration(scratch: Path) -> None:
        _write_tokenizer(scratch, source())
        write_configs(scratch, source().config, special_tokens(source()), genai=genai)

    def write_model(scratch: Path) -> None:
        write_model_files(scratch, lambda writer: _GRAPHS[shape](writer, source()))

    configs = GENAI_CONFIG_FILES if genai else CONFIG_FILES
    return [
        Step(name="tokenizer and configuration", files=(*_TOKENIZER_FILES, *configs), write=write_configuration),
        Step(name="graph and weights", files=(DATA, MODEL), write=write_model),
    ]


def _write_tokenizer(folder: Path, source: GgufWeights) -> None:
    build_tokenizer(source).save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", tokenizer_config(source))
    (folder / "chat_template.jinja").write_text(chat_template(source), encoding="utf-8")
    (folder / "chat_template.original.jinja").write_text(original_chat_template(source), encoding="utf-8")
