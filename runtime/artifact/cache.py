"""The project's folder in the user's cache."""

from __future__ import annotations

import os
from pathlib import Path


def cache_home() -> Path:
    """`$XDG_CACHE_HOME/furiosa-llm-onnx`, or `~/.cache/furiosa-llm-onnx`; RuntimeError for a user without a home."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "furiosa-llm-onnx"
