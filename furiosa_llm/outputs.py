"""The vendor's module path: `from furiosa_llm.outputs import RequestOutput`."""

from furiosa_llm.runtime import CompletionOutput, RequestOutput

__all__ = ["CompletionOutput", "RequestOutput"]
