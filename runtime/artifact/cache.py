"""The project's folder in the user's cache."""

from __future__ import annotations

import os
from pathlib import Path


def cache_home() -> Path:
    """`$XDG_CACHE_HOME/furiosa-llm-onnx`, or `~/.cache/furiosa-llm-onnx`; RuntimeError for a user without a home.

    A relative path counts for nothing, as XDG's specification has it: each folder would have a cache of its own.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "furiosa-llm-onnx"
