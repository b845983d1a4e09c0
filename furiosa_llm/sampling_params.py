"""The vendor's module path: `from furiosa_llm.sampling_params import SamplingParams`."""

from furiosa_llm.runtime import RequestOutputKind, SamplingParams, SamplingType, StructuredOutputsParams

__all__ = ["RequestOutputKind", "SamplingParams", "SamplingType", "StructuredOutputsParams"]
