"""Names where the vendor's users import them from."""

from __future__ import annotations

import importlib

import pytest

import furiosa_llm


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("furiosa_llm.api", ["LLM", "SamplingParams", "RequestOutput", "CompletionOutput"]),
        ("furiosa_llm.llm_engine", ["LLMEngine", "AsyncLLMEngine", "EngineArgs", "AsyncEngineArgs", "SchedulerConfig"]),
        ("furiosa_llm.outputs", ["RequestOutput", "CompletionOutput"]),
        ("furiosa_llm.sampling_params", ["SamplingParams", "RequestOutputKind"]),
        ("furiosa_llm.artifact", ["ArtifactBuilder"]),
        ("furiosa_llm.artifact.builder", ["ArtifactBuilder"]),
    ],
)
def test_names_are_those_of_the_package(module: str, names: list[str]) -> None:
    imported = importlib.import_module(module)
    assert [name for name in names if getattr(imported, name) is not getattr(furiosa_llm, name)] == []
    assert [name for name in imported.__all__ if not hasattr(imported, name)] == []


def test_the_other_way_to_load() -> None:
    assert furiosa_llm.__full_version__.startswith(f"{furiosa_llm.__version__}+onnxruntime.")
    assert importlib.import_module("furiosa_llm.api").load_artifact == furiosa_llm.LLM.load_artifact
    assert [name for name in furiosa_llm.__all__ if not hasattr(furiosa_llm, name)] == []
