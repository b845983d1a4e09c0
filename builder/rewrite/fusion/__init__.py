"""Recognise attention by its structure: decomposed attention with a growing cache becomes one GroupQueryAttention."""

from furiosa_llm.builder.rewrite.fusion.fuse import Fusion, fuse_attention

__all__ = ["Fusion", "fuse_attention"]
