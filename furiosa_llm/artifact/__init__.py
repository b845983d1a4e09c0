"""The vendor's module path: `from furiosa_llm.artifact import ArtifactBuilder`."""

from furiosa_llm.builder import ArtifactBuilder

__all__ = ["ArtifactBuilder"]
