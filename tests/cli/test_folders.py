"""Five folders as exporters leave them, built and answering without an option; and what is said of missing files."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from furiosa_llm.runtime import open_artifact
from tests.cli.conftest import OPTIMUM, Cli
from tests.support.tiers import tiered

GENAI = "tiny-llama-genai-fp32"
HASH = "0a1b2c3d4e5f60718293a4b5c6d7e8f901234567"


def genai(zoo: Path, folder: Path) -> Path:
    return Path(shutil.copytree(zoo / GENAI, folder / "my-llama"))


def optimum(zoo: Path, folder: Path) -> Path:
    return Path(shutil.copytree(zoo / OPTIMUM, folder / "my-llama"))


def repository(zoo: Path, folder: Path) -> Path:
    """The model in the folder `onnx`, the rest one up."""
    made = optimum(zoo, folder)
    (made / "onnx").mkdir()
    return (made / "model.onnx").rename(made / "onnx" / "model.onnx").parent.parent


def several_variants(zoo: Path, folder: Path) -> Path:
    made = repository(zoo, folder)
    for name in ("model_fp16.onnx", "model_q4.onnx"):
        (made / "onnx" / name).write_text("not looked at")
    return made


def cache(zoo: Path, folder: Path) -> Path:
    """A snapshot of the Hugging Face cache, whose files are links to blobs."""
    made = repository(zoo, folder / "made")
    whole = folder / "models--somebody--my-llama"
    (whole / "blobs").mkdir(parents=True)
    (whole / "refs").mkdir()
    (whole / "refs" / "main").write_text(HASH)
    snapshot = whole / "snapshots" / HASH
    for number, file in enumerate(path for path in made.rglob("*") if path.is_file()):
        link = snapshot / file.relative_to(made)
        link.parent.mkdir(parents=True, exist_ok=True)
        file.rename(whole / "blobs" / f"blob{number}")
        link.symlink_to(whole / "blobs" / f"blob{number}")
    return snapshot


LAYOUTS: dict[str, Callable[[Path, Path], Path]] = {
    make.__name__: make for make in (genai, optimum, repository, several_variants, cache)
}


@pytest.mark.parametrize("layout", tiered(LAYOUTS, ["cache"]))
def test_a_folder_is_built_and_answers(
    layout: str, zoo: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    built = cli("build", LAYOUTS[layout](zoo, tmp_path / "models"))
    assert built.code == 0, built.err
    assert ("beside model.onnx lie model_fp16.onnx, model_q4.onnx: give the path of one" in built.out) == (
        layout == "several_variants"
    )
    artifact = tmp_path / "my-llama-tp4.artifact"
    assert open_artifact(artifact).manifest.model.name == "my-llama"
    answered = cli("generate", artifact, "--prompt", "hello", "--chat", "--max-tokens", 4)
    assert answered.code == 0, answered.err
    assert "4 tokens" in answered.err


def test_what_will_not_work_is_said(zoo: Path, tmp_path: Path, cli: Cli) -> None:
    """And works all the same, where an option gives what is missing."""
    made = optimum(zoo, tmp_path)
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (made / name).rename(tokenizer / name)
    (made / "config.json").unlink()
    built = cli("build", made, tmp_path / "a")
    assert [line.partition(":")[0] for line in built.err.splitlines()] == ["warning"] * 3
    for what in ("no tokenizer.json: prompts have", "no end-of-sequence token in", "no length limit in config.json or"):
        assert f"warning: {what}" in built.err
    assert cli("generate", tmp_path / "a", "--prompt", "hello").code == 1
    answered = cli("generate", tmp_path / "a", "--prompt", "hello", "--tokenizer", tokenizer, "--max-tokens", 2)
    assert answered.code == 0, answered.err
