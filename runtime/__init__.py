"""Run time: an artifact in, tensors or tokens out. Owns the artifact format.

`LLM`, `LLMEngine` and `AsyncLLMEngine` generate, `Executor` runs any artifact on tensors, `verify_against` compares one
with the model it came from.
"""

from furiosa_llm.runtime.adapters.adapter import LoRARequest
from furiosa_llm.runtime.artifact.reader import Artifact, open_artifact
from furiosa_llm.runtime.async_engine import AsyncLLMEngine
from furiosa_llm.runtime.engine.buckets import Bucket, BucketConfig
from furiosa_llm.runtime.engine.engine_args import AsyncEngineArgs, EngineArgs, SchedulerConfig
from furiosa_llm.runtime.errors import EngineDeadError, InputError, ReplicaError
from furiosa_llm.runtime.execution.executor import Executor
from furiosa_llm.runtime.llm import LLM
from furiosa_llm.runtime.llm_engine import LLMEngine
from furiosa_llm.runtime.requests.outputs import CompletionOutput, RequestOutput
from furiosa_llm.runtime.tokens.sampling_params import RequestOutputKind, SamplingParams, SamplingType
from furiosa_llm.runtime.tokens.structured_outputs import StructuredOutputsParams
from furiosa_llm.runtime.verification.parity import verify_against

__all__ = [
    "LLM",
    "Artifact",
    "AsyncEngineArgs",
    "AsyncLLMEngine",
    "Bucket",
    "BucketConfig",
    "CompletionOutput",
    "EngineArgs",
    "EngineDeadError",
    "Executor",
    "InputError",
    "LLMEngine",
    "LoRARequest",
    "ReplicaError",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "SamplingType",
    "SchedulerConfig",
    "StructuredOutputsParams",
    "open_artifact",
    "verify_against",
]
