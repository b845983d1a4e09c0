"""The vendor's module path: `from furiosa_llm.artifact.builder import ArtifactBuilder`."""

from furiosa_llm.builder import ArtifactBuilder

__all__ = ["ArtifactBuilder"]
