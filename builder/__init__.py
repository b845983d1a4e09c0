"""Compile time: build an artifact from an ONNX model. This package knows op rules and costs, but no requests."""

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
from furiosa_llm.builder.model_plan import ModelPlan, plan_model
from furiosa_llm.builder.plan.tactics import Tactics, read_tactics
from furiosa_llm.builder.reshard import reshard
from furiosa_llm.builder.reuse import build_by_plan_of
from furiosa_llm.builder.write.report import BuildReport, Decision

__all__ = [
    "ArtifactBuilder",
    "BuildError",
    "BuildReport",
    "Decision",
    "ModelLoadError",
    "ModelPlan",
    "OptionError",
    "OutputError",
    "PlanError",
    "ShapeError",
    "Tactics",
    "UnsupportedModelError",
    "build_by_plan_of",
    "plan_model",
    "read_tactics",
    "reshard",
]
