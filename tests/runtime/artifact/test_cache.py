"""Where the project keeps what can be made again."""

from __future__ import annotations

from pathlib import Path

import pytest

from furiosa_llm.runtime.artifact.cache import cache_home


def test_cache_home_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_home() == tmp_path / "furiosa-llm-onnx"
    for unset in ("relative", ""):
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert cache_home().is_relative_to(Path.home())
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_home() == Path.home() / ".cache" / "furiosa-llm-onnx"
