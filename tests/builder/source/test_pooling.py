"""pooling.json: told by what sentence-transformers puts beside a model, carried through builds, and strictly read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from furiosa_llm.builder import ArtifactBuilder, reshard
from furiosa_llm.builder.errors import ModelLoadError
from furiosa_llm.builder.source.pooling import pooling_json
from furiosa_llm.runtime.artifact.errors import ArtifactError
from furiosa_llm.runtime.artifact.pooling import Pooling, parse_pooling, pooling_of
from furiosa_llm.runtime.artifact.reader import open_artifact
from tests.support.artifacts import artifact_of

TRANSFORMER = {"path": "", "type": "sentence_transformers.models.Transformer"}
POOLING = {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}
NORMALIZE = {"path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}
DENSE = {"path": "2_Dense", "type": "sentence_transformers.models.Dense"}
CLS = {"word_embedding_dimension": 64, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}


def write(folder: Path, modules: Any, pooling: Any = None, limit: Any = None) -> Path:
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(CLS if pooling is None else pooling))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": limit}))
    return folder / "model.onnx"


def test_what_the_modules_say(tmp_path: Path) -> None:
    def told(*arguments: Any) -> Pooling:
        data = pooling_json(write(tmp_path, *arguments))
        assert data is not None
        return parse_pooling(data)

    assert told([TRANSFORMER, POOLING, NORMALIZE], None, 128) == Pooling(
        pooling="cls", normalize=True, max_sequence_length=128
    )
    assert told([TRANSFORMER, POOLING]) == Pooling(pooling="cls", normalize=False, max_sequence_length=None)
    for mode, pooling in (("mean_tokens", "mean"), ("lasttoken", "last")):
        assert told([TRANSFORMER, POOLING], {f"pooling_mode_{mode}": True}).pooling == pooling


def test_nothing_is_told_without_modules_or_beside_the_file_itself(tmp_path: Path) -> None:
    assert pooling_json(tmp_path / "model.onnx") is None
    model = write(tmp_path, [TRANSFORMER, POOLING])
    (tmp_path / "pooling.json").write_bytes(Pooling().to_bytes())
    assert pooling_json(model) is None


@pytest.mark.parametrize(
    ("modules", "pooling", "expected"),
    [
        ([TRANSFORMER, POOLING, DENSE], None, "modules Transformer, Pooling, Dense, expected"),
        ([TRANSFORMER], None, "modules Transformer, expected"),
        ({"a": 1}, None, "is not a list of modules"),
        ([{"type": "x"}], None, "is not a list of modules"),
        ([TRANSFORMER, POOLING], {"pooling_mode_max_tokens": True}, "asks for pooling_mode_max_tokens, expected one"),
        ([TRANSFORMER, POOLING], {**CLS, "pooling_mode_mean_tokens": True}, "pooling_mode_mean_tokens, expected one"),
        ([TRANSFORMER, POOLING], {}, "asks for no pooling"),
    ],
)
def test_what_an_artifact_cannot_stand_for(modules: Any, pooling: Any, expected: str, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=rf"{expected}(?s:.*)write a pooling\.json beside the model"):
        pooling_json(write(tmp_path, modules, pooling))


def test_builds_carry_it(zoo: Path, tmp_path: Path) -> None:
    assert pooling_of(open_artifact(artifact_of("tiny-bert-optimum"))) == Pooling(pooling="mean", normalize=True)
    shutil.copytree(zoo / "tiny-bert-optimum", tmp_path / "model")
    model = write(tmp_path / "model", [TRANSFORMER, POOLING], None, 99)
    ArtifactBuilder(model).build(tmp_path / "4")
    expected = Pooling(pooling="cls", normalize=False, max_sequence_length=99)
    assert pooling_of(open_artifact(tmp_path / "4")) == expected


@pytest.mark.slow
def test_other_sizes_and_own_files_carry_it(zoo: Path, tmp_path: Path) -> None:
    shutil.copytree(zoo / "tiny-bert-optimum", tmp_path / "model")
    model = write(tmp_path / "model", [TRANSFORMER, POOLING], None, 99)
    ArtifactBuilder(model).build(tmp_path / "4")
    expected = Pooling(pooling="cls", normalize=False, max_sequence_length=99)
    reshard(tmp_path / "4", tmp_path / "8", tensor_parallel_size=8)
    assert pooling_of(open_artifact(tmp_path / "8")) == expected
    for own in ("modules.json", "sentence_bert_config.json"):
        (tmp_path / "model" / own).unlink()
    (tmp_path / "model" / "pooling.json").write_bytes(Pooling(pooling="last").to_bytes())
    ArtifactBuilder(model).build(tmp_path / "own")
    assert pooling_of(open_artifact(tmp_path / "own")) == Pooling(pooling="last")


@pytest.mark.parametrize(
    ("changed", "where"),
    [
        ({"pooling": "max"}, r"\$\.pooling: found \"max\", expected one of mean, cls, last"),
        ({"normalize": 1}, r"\$\.normalize: found 1, expected true or false"),
        ({"max_sequence_length": 0}, r"\$\.max_sequence_length: found 0"),
        ({"more": 1}, "unknown key 'more'"),
    ],
)
def test_a_malformed_file(changed: Any, where: str) -> None:
    whole = json.loads(Pooling().to_bytes())
    with pytest.raises(ArtifactError, match=rf"pooling\.json .*{where}"):
        parse_pooling(json.dumps(whole | changed).encode())
    with pytest.raises(ArtifactError, match="is not whole UTF-8 JSON"):
        parse_pooling(b"{")


def test_a_file_that_is_far_too_long(zoo: Path, tmp_path: Path) -> None:
    shutil.copytree(zoo / "tiny-bert-optimum", tmp_path / "model")
    (tmp_path / "model" / "pooling.json").write_bytes(b" " * 2**17)
    ArtifactBuilder(tmp_path / "model" / "model.onnx").build(tmp_path / "artifact")
    with pytest.raises(ArtifactError, match=r"pooling\.json is longer than 65536 bytes"):
        pooling_of(open_artifact(tmp_path / "artifact"))
