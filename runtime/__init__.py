"""Run time: an artifact in, tensors or tokens out. Owns the artifact format.

`LLM` generates, `Executor` runs any artifact on tensors, `verify_against` compares one with the model it came from.
"""

from furiosa_llm.runtime.artifact.reader import Artifact, open_artifact
from furiosa_llm.runtime.errors import InputError
from furiosa_llm.runtime.executor import Executor
from furiosa_llm.runtime.llm import LLM
from furiosa_llm.runtime.outputs import CompletionOutput, RequestOutput
from furiosa_llm.runtime.sampling_params import RequestOutputKind, SamplingParams
from furiosa_llm.runtime.verify import verify_against

__all__ = [
    "LLM",
    "Artifact",
    "CompletionOutput",
    "Executor",
    "InputError",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "open_artifact",
    "verify_against",
]
