"""The errors of loading, running and generating. An error that a wrong argument causes is a ValueError too."""

from __future__ import annotations

from furiosa_llm.runtime.artifact.errors import FuriosaLLMError


class ExecutionError(FuriosaLLMError):
    """onnxruntime could not load or run a segment on a rank."""


class KernelError(ExecutionError):
    """onnxruntime has no CPU kernel on this machine for an op in the types that the program has."""


class InputError(FuriosaLLMError, ValueError):
    """An input tensor's name, type or shape is not what the model takes."""


class ContextLengthError(FuriosaLLMError, ValueError):
    """A prompt, or a prompt and its completion, is longer than the model's limit."""


class SamplingParamsError(FuriosaLLMError, ValueError):
    """A sampling parameter is out of its range, or contradicts another."""


class TokenizerError(FuriosaLLMError, ValueError):
    """The tokenizer or the chat template is missing, malformed, or refuses its input."""


class UnsupportedError(FuriosaLLMError, ValueError):
    """A model or an option is outside of what this release can do."""


class StepTimeoutError(ExecutionError):
    """A batch, or making a session ready, was not done within the time that it may take."""


class ReplicaError(FuriosaLLMError):
    """A replica failed while it had the request; `__cause__` is what happened there. Other replicas run on."""


class EngineDeadError(FuriosaLLMError):
    """The engine takes no requests any more: it was closed, or every replica failed and could not be rebuilt."""


class DeviceError(FuriosaLLMError, ValueError):
    """A device string is malformed, or names a PE twice."""


class TopologyError(FuriosaLLMError, ValueError):
    """Sizes of parallelism do not fit the devices, or stages not the artifact's blocks."""


class CapacityError(FuriosaLLMError, ValueError):
    """What is to be kept in memory, or a sequence, is greater than the room for it, or a limit is no number above 0."""


class SchedulingError(FuriosaLLMError, ValueError):
    """The scheduler was given a sequence or a batch that it does not know, knows already, or does not wait for."""


class WorkerError(FuriosaLLMError):
    """A worker process has ended, or failed with an error of another library."""


class StageError(WorkerError):
    """A stage on another host has ended, cannot be reached, or refuses; the text names the stage and its host."""


class NoHostError(WorkerError):
    """No host has room for a stage at the moment; the replica waits for one."""


class WireError(WorkerError):
    """What came over a connection between hosts is no message of theirs."""
