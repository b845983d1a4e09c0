"""What can go wrong while the example model is made."""

from __future__ import annotations

from furiosa_llm.runtime.artifact.errors import FuriosaLLMError


class ExampleModelError(FuriosaLLMError):
    """Base of every error raised while a model is fetched and written."""


class DownloadError(ExampleModelError):
    """The package index did not give the package asked for."""


class ChecksumError(ExampleModelError):
    """A file is not, byte for byte, the one this recipe was written for."""


class ModelFileError(ExampleModelError):
    """A model file lacks what the recipe reads from it, or holds it in another form."""


class CacheError(ExampleModelError):
    """The cache folder cannot be written, locked or read back."""
