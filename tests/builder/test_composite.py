"""A folder with an encoder and its decoder becomes one artifact, whole or not at all, with the tokens it needs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx
import pytest

from furiosa_llm.builder import ArtifactBuilder, reshard
from furiosa_llm.builder.composite import find_encoder_decoder
from furiosa_llm.builder.errors import ModelLoadError, OptionError, OutputError, UnsupportedModelError
from furiosa_llm.builder.plan.tactics import Tactics
from furiosa_llm.builder.source.generation_tokens import end_tokens, start_token
from furiosa_llm.runtime.artifact.composite import open_composite
from furiosa_llm.runtime.artifact.errors import ArtifactError
from tests.support.artifacts import built_model

TOKENIZER = {
    "padding": {"pad_id": 7},
    "post_processor": {
        "single": [{"Sequence": {"id": "A"}}, {"SpecialToken": {"id": "</s>"}}],
        "special_tokens": {"</s>": {"id": "</s>", "ids": [9]}},
    },
}


@pytest.fixture(scope="module")
def t5(zoo: Path) -> Path:
    return zoo / "tiny-t5-optimum"


@pytest.fixture
def copy(t5: Path, tmp_path: Path) -> Path:
    shutil.copytree(t5, tmp_path / "model")
    return tmp_path / "model"


def content(folder: Path) -> Mapping[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_names_that_exporters_give(tmp_path: Path, zoo: Path) -> None:
    (tmp_path / "encoder.onnx").touch()
    (tmp_path / "decoder.onnx").touch()
    found = find_encoder_decoder(tmp_path)
    assert found is not None
    assert {name: path.name for name, path in found.sources.items()} == {
        "encoder": "encoder.onnx",
        "decoder": "decoder.onnx",
    }
    optimum = find_encoder_decoder(zoo / "tiny-t5-optimum")
    assert optimum is not None
    assert [(name, path.name) for name, path in optimum.sources.items()] == [
        ("encoder", "encoder_model.onnx"),
        ("decoder_first", "decoder_model.onnx"),
        ("decoder", "decoder_with_past_model.onnx"),
    ]
    assert find_encoder_decoder(zoo / "tiny-bert-optimum") is None
    assert find_encoder_decoder(zoo / "tiny-bert-optimum" / "model.onnx") is None


def test_a_folder_without_the_first_decoder(tmp_path: Path, copy: Path) -> None:
    (copy / "decoder_model.onnx").unlink()
    with pytest.raises(ModelLoadError, match=r"has encoder_model\.onnx but no decoder_model\.onnx.*first token"):
        ArtifactBuilder(copy)
    with pytest.raises(ModelLoadError, match="is a folder, expected an ONNX file"):
        ArtifactBuilder(tmp_path).build(tmp_path / "artifact")


@pytest.mark.slow
def test_resharding_gives_what_a_build_gives(t5: Path, tmp_path: Path) -> None:
    report = built_model(t5.name, 4).report
    for size in (4, 8):
        shutil.copytree(built_model(t5.name, size).folder, tmp_path / str(size))
    again = reshard(tmp_path / "4", tmp_path / "resharded", tensor_parallel_size=8)
    assert content(tmp_path / "8") == content(tmp_path / "resharded")
    assert content(tmp_path / "4") != content(tmp_path / "8")
    assert again.tensor_parallel_size == 8
    assert [Path(part.artifact).name for part in report.parts] == ["encoder", "decoder_first", "decoder"]
    assert report.weight_nbytes == sum(part.weight_nbytes for part in report.parts)
    assert report.stored_nbytes == sum(path.stat().st_size for path in (tmp_path / "4").rglob("weights-*.safetensors"))
    assert report.collectives == report.parts[2].collectives
    assert (report.faults, report.notes) == ((), ())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["4", "8", "resharded"]
    assert open_composite(tmp_path / "4").manifest.name == "tiny-t5-optimum"


def test_what_exists_is_replaced_only_if_asked(copy: Path, tmp_path: Path) -> None:
    (copy / "decoder_with_past_model.onnx").unlink()
    builder = ArtifactBuilder(copy, "mine")
    builder.build(tmp_path / "artifact")
    before = content(tmp_path / "artifact")
    with pytest.raises(OutputError, match="exists already"):
        builder.build(tmp_path / "artifact")
    assert content(tmp_path / "artifact") == before
    shutil.copy(copy / "encoder_model.onnx", copy / "decoder_model.onnx")  # which reads nothing of an encoder
    with pytest.raises(UnsupportedModelError, match=r"the encoder gives .*last_hidden_state.*expected one output"):
        ArtifactBuilder(copy, "other").build(tmp_path / "artifact", force=True)
    assert content(tmp_path / "artifact") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["artifact", "model"]


@pytest.mark.slow
def test_a_state_that_nothing_gives(copy: Path, tmp_path: Path) -> None:
    model = onnx.load(copy / "decoder_model.onnx")
    kept = [value for value in model.graph.output if value.name != "present.1.encoder.key"]
    del model.graph.output[:]
    model.graph.output.extend(kept)
    onnx.save(model, copy / "decoder_model.onnx")
    with pytest.raises(UnsupportedModelError, match=r"takes the state 'past_key_values\.1\.encoder\.key', which"):
        ArtifactBuilder(copy).build(tmp_path / "artifact")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.slow
def test_parts_that_do_not_fit_are_not_published(copy: Path, tmp_path: Path) -> None:
    config = json.loads((copy / "config.json").read_text()) | {"decoder_start_token_id": 5000}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match="has 1024 tokens, but generation begins with 5000"):
        ArtifactBuilder(copy).build(tmp_path / "artifact")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("options", "name"), [({"dims": {"encoder": 4}}, "--dim"), ({"tactics": Tactics(tactics=())}, "--tactics")]
)
def test_options_about_one_graph(options: Any, name: str, t5: Path) -> None:
    with pytest.raises(OptionError, match=f"{name} is about one graph"):
        ArtifactBuilder(t5, **options)


@pytest.mark.slow
def test_the_current_folder_has_a_name(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copy)
    ArtifactBuilder(".").build(tmp_path / "artifact")
    composite = open_composite(tmp_path / "artifact")
    assert composite.manifest.name == tmp_path.name, "`model` says nothing"
    assert composite.encoder.manifest.model.name == f"{tmp_path.name} encoder"


def write(folder: Path, **files: Any) -> Path:
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder / "decoder.onnx"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"generation_config": {"decoder_start_token_id": 3}, "config": {"decoder_start_token_id": 4}}, (3, "gen")),
        ({"generation_config": {"bos_token_id": 3}, "config": {"decoder_start_token_id": 4}}, (4, "config")),
        ({"config": {"bos_token_id": 5}, "tokenizer": TOKENIZER}, (5, "config")),
        ({"config": {"decoder_start_token_id": None}, "tokenizer": TOKENIZER}, (7, "tokenizer")),
    ],
)
def test_where_the_first_token_is_told(files: Any, expected: tuple[int, str], tmp_path: Path) -> None:
    token, file = start_token(write(tmp_path, **files))
    assert token == expected[0]
    assert file.startswith(expected[1])


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"generation_config": {"eos_token_id": [3, 4]}, "config": {"eos_token_id": 5}}, (3, 4)),
        ({"config": {"eos_token_id": 5}, "tokenizer": TOKENIZER}, (5,)),
        ({"tokenizer": TOKENIZER}, (9,)),
    ],
)
def test_where_the_last_token_is_told(files: Any, expected: tuple[int, ...], tmp_path: Path) -> None:
    assert end_tokens(write(tmp_path, **files))[0] == expected


@pytest.mark.parametrize("tokenizer", [None, {}, {"padding": None, "post_processor": None}, {"padding": 3}])
@pytest.mark.parametrize("told", [start_token, end_tokens])
def test_tokens_that_nothing_tells(told: Callable[[Path], object], tokenizer: Any, tmp_path: Path) -> None:
    files = {} if tokenizer is None else {"tokenizer": tokenizer}
    with pytest.raises(ModelLoadError, match=r"nothing in .* says which token .*decoder_start_token_id"):
        told(write(tmp_path, **files))
