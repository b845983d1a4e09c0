"""The error types that every part of the project derives from."""


class FuriosaLLMError(Exception):
    """Base of every error a user can cause; the command line prints it as one paragraph and exits with `exit_code`."""

    exit_code = 1


class ArtifactError(FuriosaLLMError):
    """An artifact's folder, manifest, program or header is not what the format says."""


class ComputeError(FuriosaLLMError, ValueError):
    """A type to compute in that programs are not converted to."""


class LayoutError(FuriosaLLMError):
    """A dimension's layout is malformed or does not fit the mesh."""


class OutputFileError(FuriosaLLMError):
    """A file that was asked for cannot be written, or exists already."""


class AdapterError(FuriosaLLMError, ValueError):
    """An adapter is none, or not one of this model: a module, a shape, a rank, a type or a name does not fit."""
