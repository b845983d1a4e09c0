"""The public face of furiosa-llm for ONNX: what users import."""

from importlib.metadata import version

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
    "ReplicaError",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "SchedulerConfig",
    "StructuredOutputsParams",
    "__full_version__",
    "__version__",
]
