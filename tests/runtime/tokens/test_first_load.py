"""Tokenizers that end, hang or fill the process that loads them, and what the library raises when it panics."""

from __future__ import annotations

import base64
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from furiosa_llm.runtime.errors import TokenizerError
from furiosa_llm.runtime.tokens import first_load
from furiosa_llm.runtime.tokens.tokenizer import Tokenizer

OUT_OF_BOUNDS = struct.pack("<I", 4) + b"\xff" * 4 + b"abc"
"""A charsmap whose only entry leads far out of it: it loads, and panics with the first character."""


def written(folder: Path, charsmap: bytes) -> Path:
    """A tokenizer of one word with a normalizer made of `charsmap`."""
    content = {
        "version": "1.0",
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()},
        "model": {"type": "WordLevel", "vocab": {"a": 0, "<unk>": 1}, "unk_token": "<unk>"},
        "added_tokens": [],
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("charsmap", "reason"),
    [(b"", "precompiled_charsmap"), (OUT_OF_BOUNDS, "index out of bounds")],
)
def test_a_panic_of_the_library_refuses_the_tokenizer(tmp_path: Path, charsmap: bytes, reason: str) -> None:
    with pytest.raises(TokenizerError, match=rf"tokenizer\.json is not a tokenizer: .*{reason}"):
        Tokenizer.from_folder(written(tmp_path, charsmap))


def test_a_panic_at_a_text_is_an_error_of_that_text(tmp_path: Path) -> None:
    text = (written(tmp_path, OUT_OF_BOUNDS) / "tokenizer.json").read_text()
    tokenizer = Tokenizer.of_text(text, {}, None)
    with pytest.raises(TokenizerError, match="the tokenizer refuses 'é': index out of bounds"):
        tokenizer.encode("é")


def in_place_of_the_child(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_: str, **options: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-S", "-c", code], **options)

    monkeypatch.setattr(first_load, "lean_process", start)


def test_a_tokenizer_that_ends_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_place_of_the_child("import os; os.abort()", monkeypatch)
    with pytest.raises(TokenizerError, match=r"the process that loaded it ended with -6, where it may take 4 GiB"):
        Tokenizer.from_folder(written(tmp_path, b"aborts"))


def test_a_tokenizer_that_hangs_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_place_of_the_child("import time; time.sleep(600)", monkeypatch)
    monkeypatch.setattr(first_load, "_SECONDS", 0.05)
    with pytest.raises(TokenizerError, match=r"loading it takes more than 0\.05 s"):
        Tokenizer.from_folder(written(tmp_path, b"hangs"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The empty cache of a user whose process has loaded nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(first_load, "_LOADED", set())
    return tmp_path / "cache" / "furiosa-llm-onnx" / "tokenizers"


PASSES = '{"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}, "added_tokens": []}'


def test_what_has_passed_is_not_tried_again_by_the_next_process(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first_load.check_loads(PASSES, "tokenizer.json")
    [verdict] = cache.iterdir()
    assert verdict.read_text() == verdict.name
    in_place_of_the_child("import os; os.abort()", monkeypatch)
    first_load._LOADED.clear()
    first_load.check_loads(PASSES, "tokenizer.json")
    with pytest.raises(TokenizerError, match="the process that loaded it ended with -6"):
        first_load.check_loads(PASSES + " ", "tokenizer.json")
    assert list(cache.iterdir()) == [verdict]


def test_what_another_user_has_left_is_not_believed(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first_load.check_loads(PASSES, "tokenizer.json")
    first_load._LOADED.clear()
    in_place_of_the_child("import os; os.abort()", monkeypatch)
    monkeypatch.setattr(os, "geteuid", lambda: cache.stat().st_uid + 1)
    with pytest.raises(TokenizerError, match="the process that loaded it ended with -6"):
        first_load.check_loads(PASSES, "tokenizer.json")


def _renamed(verdict: Path) -> None:
    verdict.write_text("0" * 64)


def _link(verdict: Path) -> None:
    verdict.rename(verdict.with_name("elsewhere"))
    verdict.symlink_to("elsewhere")


def _open(verdict: Path) -> None:
    verdict.chmod(0o666)


def _cut(verdict: Path) -> None:
    verdict.write_text("")


def _hang(verdict: Path) -> None:
    verdict.unlink()
    os.mkfifo(verdict)


@pytest.mark.parametrize("harm", [_renamed, _link, _hang, _open, _cut])
def test_what_others_may_have_made_of_it_is_not_believed(
    harm: Callable[[Path], None], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder that is another's a verdict may be given the name of a tokenizer that nobody has tried."""
    first_load.check_loads(PASSES, "tokenizer.json")
    [verdict] = cache.iterdir()
    harm(verdict)
    first_load._LOADED.clear()
    with monkeypatch.context() as patched:
        in_place_of_the_child("import os; os.abort()", patched)
        with pytest.raises(TokenizerError, match="the process that loaded it ended with -6"):
            first_load.check_loads(PASSES, "tokenizer.json")
    first_load.check_loads(PASSES, "tokenizer.json")
    assert verdict.read_text() == verdict.name
    assert not verdict.is_symlink()


def test_without_a_cache_each_process_tries_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.parent.parent.write_text("a file in place of the folder")
    first_load.check_loads(PASSES, "tokenizer.json")
    in_place_of_the_child("import os; os.abort()", monkeypatch)
    first_load.check_loads(PASSES, "tokenizer.json")
    first_load._LOADED.clear()
    with pytest.raises(TokenizerError, match="the process that loaded it ended with -6"):
        first_load.check_loads(PASSES, "tokenizer.json")


def test_without_waiting_the_error_comes_later(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(written(tmp_path, b"late"), wait=False)
    for _ in range(2):
        with pytest.raises(TokenizerError, match="is not a tokenizer"):
            tokenizer.wait_until_loaded()
