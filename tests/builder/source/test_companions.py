"""Files next to a model that are longer, or nested deeper, than any honest one."""

from __future__ import annotations

from pathlib import Path

import pytest

from furiosa_llm.builder.errors import ModelLoadError
from furiosa_llm.builder.source.companions import companions, eos_token_ids, max_sequence_length
from furiosa_llm.runtime.artifact.json_reader import MAX_COMPANION_NBYTES


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tmp_path / "model.onnx"


def stretched(model: Path, name: str, nbytes: int) -> None:
    """A file that a disk has for nothing."""
    with (model.parent / name).open("wb") as file:
        file.truncate(nbytes)


def test_a_giant_is_refused_unread(model: Path) -> None:
    stretched(model, "tokenizer.json", MAX_COMPANION_NBYTES)
    assert [path.name for path in companions(model)] == ["tokenizer.json"]
    stretched(model, "tokenizer.json", 2**40)
    with pytest.raises(ModelLoadError, match=r"tokenizer\.json goes with the model, and is 1099511627776 bytes"):
        companions(model)


def test_a_long_configuration_is_not_parsed(model: Path) -> None:
    stretched(model, "config.json", 2**24 + 1)
    with pytest.raises(ModelLoadError, match=r"config\.json is 16777217 bytes long, expected at most 16777216"):
        max_sequence_length(model)


def test_a_deep_configuration_is_no_json(model: Path) -> None:
    (model.parent / "generation_config.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
    with pytest.raises(ModelLoadError, match=r"generation_config\.json is not JSON"):
        eos_token_ids(model)
