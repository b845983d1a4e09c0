"""Compile time: an ONNX model in, an artifact out. Knows op rules and costs, no requests."""

from furiosa_llm.builder.artifact_builder import ArtifactBuilder
from furiosa_llm.builder.errors import (
    BuildError,
    ModelLoadError,
    OptionError,
    OutputError,
    PlanError,
    ShapeError,
    UnsupportedModelError,
)
from furiosa_llm.builder.report import BuildReport, Decision

__all__ = [
    "ArtifactBuilder",
    "BuildError",
    "BuildReport",
    "Decision",
    "ModelLoadError",
    "OptionError",
    "OutputError",
    "PlanError",
    "ShapeError",
    "UnsupportedModelError",
]
