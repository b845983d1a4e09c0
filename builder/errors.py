"""The builder's error types; each message says what was found, what was expected and what to do."""

from furiosa_llm.runtime.artifact.errors import FuriosaLLMError


class BuildError(FuriosaLLMError):
    """A model cannot be built into an artifact."""


class ModelLoadError(BuildError):
    """The source file is missing, is not ONNX, or refers to data that is missing or out of bounds."""


class UnsupportedModelError(BuildError):
    """The graph holds something that cannot be partitioned, for instance an If that cannot be inlined."""


class ShapeError(BuildError):
    """The shapes of the graph contradict each other, or a size is missing that the user has to give."""


class PlanError(BuildError):
    """A plan that was asked for is infeasible."""


class AnnotationError(BuildError):
    """A model's multi-device annotations contradict each other, or the options of the build."""


class ConstraintError(BuildError):
    """Constraints on a plan contradict each other, or the model."""


class OutputError(BuildError):
    """The output folder cannot be written, or exists already."""


class OptionError(BuildError, ValueError):
    """An option has a value that is not accepted."""

    exit_code = 2
