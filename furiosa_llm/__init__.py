"""The public face of furiosa-llm for ONNX: what users import."""

from importlib.metadata import version

from furiosa_llm.builder import ArtifactBuilder, BuildReport
from furiosa_llm.runtime import LLM, CompletionOutput, RequestOutput, RequestOutputKind, SamplingParams
from furiosa_llm.runtime.artifact.errors import ArtifactError, FuriosaLLMError

__version__ = version("furiosa-llm-onnx")

__all__ = [
    "LLM",
    "ArtifactBuilder",
    "ArtifactError",
    "BuildReport",
    "CompletionOutput",
    "FuriosaLLMError",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "__version__",
]
