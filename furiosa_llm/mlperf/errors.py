"""The errors of a benchmark run; what is wrong before it starts is an `InputError` or an `UnsupportedError`."""

from __future__ import annotations

from furiosa_llm.runtime.artifact.errors import FuriosaLLMError


class RunError(FuriosaLLMError):
    """LoadGen did not run, or the engine failed samples while it did; the result, if there is one, is INVALID."""


class RunInterruptedError(FuriosaLLMError):
    """Ctrl-C or SIGTERM ended a run: samples that ran were given up, and the result is INVALID."""

    exit_code = 130
