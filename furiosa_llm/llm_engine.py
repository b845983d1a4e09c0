"""The vendor's module path: `from furiosa_llm.llm_engine import LLMEngine`."""

from furiosa_llm.runtime import AsyncEngineArgs, AsyncLLMEngine, EngineArgs, LLMEngine, SchedulerConfig

__all__ = ["AsyncEngineArgs", "AsyncLLMEngine", "EngineArgs", "LLMEngine", "SchedulerConfig"]
