"""The errors of a simulation: a question that has no answer, and a file that is not what it should be."""

from __future__ import annotations

from furiosa_llm.runtime.artifact.errors import FuriosaLLMError


class DeviceFileError(FuriosaLLMError, ValueError):
    """A device file is not read: a key, a unit, a mark or a number."""


class TraceError(FuriosaLLMError, ValueError):
    """A trace is not read: a line, a key or a number."""


class LoadError(FuriosaLLMError, ValueError):
    """A load that no server can be given: lengths, concurrency or rates."""


class PlacementError(FuriosaLLMError, ValueError):
    """The model has no place on so many cards in that way, or does not fit into their memory."""
