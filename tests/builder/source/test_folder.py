"""Folders as exporters leave them: which file is the model, what it is called, and what is said where it is unclear."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from furiosa_llm.builder.errors import ModelLoadError
from furiosa_llm.builder.source.companions import companions, find_companion
from furiosa_llm.builder.source.folder import default_name, find_model, variants

HASH = "0a1b2c3d4e5f60718293a4b5c6d7e8f901234567"


def make(folder: Path, *files: str) -> Path:
    for name in files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (["gpt2.onnx", "config.json"], "gpt2.onnx"),
        (["model_q4.onnx", "model.onnx"], "model.onnx"),
        (["onnx/model_fp16.onnx", "onnx/model.onnx", "config.json"], "onnx/model.onnx"),
        (["onnx/only_q4.onnx"], "onnx/only_q4.onnx"),
        (["model.onnx", "onnx/model.onnx"], "model.onnx"),
        ([f"snapshots/{HASH}/onnx/model.onnx"], f"snapshots/{HASH}/onnx/model.onnx"),
    ],
)
def test_the_model_of_a_folder(files: list[str], found: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "llama", *files)
    if "snapshots" in found:
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(f"{HASH}\n")
    assert find_model(folder) == folder / found
    assert find_model(folder / found) == folder / found


def test_the_model_that_genai_config_names(tmp_path: Path) -> None:
    folder = make(tmp_path, "vision.onnx", "text.onnx", "genai_config.json")
    (folder / "genai_config.json").write_text('{"model": {"decoder": {"filename": "text.onnx"}}}')
    assert find_model(folder) == folder / "text.onnx"
    (folder / "genai_config.json").write_text('{"model": {"decoder": []}}')
    with pytest.raises(ModelLoadError, match=r"it holds text\.onnx, vision\.onnx"):
        find_model(folder)


def test_no_telling_which(tmp_path: Path) -> None:
    folder = make(tmp_path / "llama", "onnx/model_q4.onnx", "onnx/model_fp16.onnx")
    expected = f"holds model_fp16.onnx, model_q4.onnx: give the path of one of them, for instance {folder}/onnx/model_f"
    with pytest.raises(ModelLoadError, match=re.escape(expected)):
        find_model(folder)


def test_what_is_not_exported(tmp_path: Path) -> None:
    folder = make(tmp_path / "llama", "model.safetensors", "config.json")
    expected = rf"no \.onnx file, but model\.safetensors: export the model first, .* --model {re.escape(str(folder))}"
    with pytest.raises(ModelLoadError, match=expected):
        find_model(folder)


def test_a_cache_without_its_snapshot(tmp_path: Path) -> None:
    make(tmp_path, "refs/main").joinpath("refs/main").write_text("abc")
    with pytest.raises(ModelLoadError, match="has no snapshot abc, which refs/main names; download it again"):
        find_model(tmp_path)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("x/gpt2.onnx", "gpt2"),
        ("llama/model.onnx", "llama"),
        ("llama/onnx/model.onnx", "llama"),
        ("llama/onnx/model_q4.onnx", "llama-q4"),
        ("llama/model/model.onnx", "llama"),
        ("llama/cpu-int4/model.onnx", "cpu-int4"),
        (f"models--org--Qwen3-0.6B/snapshots/{HASH}/onnx/model.onnx", "Qwen3-0.6B"),
        ("t5/decoder_model.onnx", "decoder_model"),
    ],
)
def test_names(path: str, name: str, tmp_path: Path) -> None:
    make(tmp_path, path)
    assert default_name(tmp_path / path) == name
    if not name.endswith(("q4", "gpt2", "_model")):
        assert default_name((tmp_path / path).parent) == name


def test_a_name_where_nothing_has_one() -> None:
    assert default_name(Path("/model.onnx")) == "model"


def test_variants(tmp_path: Path) -> None:
    folder = make(tmp_path, "model.onnx", "model_q4.onnx", "model-fp16.onnx", "decoder_model.onnx")
    assert variants(folder / "model.onnx") == ["model-fp16.onnx", "model_q4.onnx"]


def test_what_belongs_to_a_model_in_the_folder_onnx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(tmp_path / "llama", "onnx/model.onnx", "onnx/config.json", "config.json", "tokenizer.json")
    model = folder / "onnx" / "model.onnx"
    assert [path.relative_to(folder).as_posix() for path in companions(model)] == ["onnx/config.json", "tokenizer.json"]
    monkeypatch.chdir(model.parent)
    assert find_companion(Path("model.onnx"), "tokenizer.json") == folder / "tokenizer.json"
    other = make(tmp_path / "other", "int4/model.onnx", "tokenizer.json")
    assert companions(other / "int4" / "model.onnx") == []


def test_no_link_above_leads_elsewhere(tmp_path: Path) -> None:
    folder = make(tmp_path / "llama", "onnx/model.onnx")
    make(tmp_path, "secret")
    (folder / "tokenizer.json").symlink_to("../secret")
    with pytest.raises(ModelLoadError, match="a link that leads outside the model's folder"):
        companions(folder / "onnx" / "model.onnx")
