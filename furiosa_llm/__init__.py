"""The public face of furiosa-llm for ONNX: what users import."""

import os
from importlib.metadata import version

# onnxruntime reads this once, at its import. Without it, it keeps an identifier of the device in the user's cache and
# reports the models that it runs.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

from furiosa_llm.builder import ArtifactBuilder, BuildReport
from furiosa_llm.runtime import (
    LLM,
    AsyncEngineArgs,
    AsyncLLMEngine,
    Bucket,
    BucketConfig,
    CompletionOutput,
    EngineArgs,
    EngineDeadError,
    LLMEngine,
    LoRARequest,
    ReplicaError,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
    SchedulerConfig,
    StructuredOutputsParams,
)
from furiosa_llm.runtime.artifact.errors import ArtifactError, FuriosaLLMError

__version__ = version("furiosa-llm-onnx")
__full_version__ = f"{__version__}+onnxruntime.{version('onnxruntime')}"

__all__ = [
    "LLM",
    "ArtifactBuilder",
    "ArtifactError",
    "AsyncEngineArgs",
    "AsyncLLMEngine",
    "Bucket",
    "BucketConfig",
    "BuildReport",
    "CompletionOutput",
    "EngineArgs",
    "EngineDeadError",
    "FuriosaLLMError",
    "LLMEngine",
    "LoRARequest",
    "ReplicaError",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "SchedulerConfig",
    "StructuredOutputsParams",
    "__full_version__",
    "__version__",
]
