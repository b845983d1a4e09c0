"""The vendor's module path: `from furiosa_llm.api import LLM`."""

from furiosa_llm.runtime import LLM, CompletionOutput, RequestOutput, SamplingParams

load_artifact = LLM.load_artifact

__all__ = ["LLM", "CompletionOutput", "RequestOutput", "SamplingParams", "load_artifact"]
