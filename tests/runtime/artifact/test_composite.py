"""A composite artifact whose parts are missing, others, or do not fit is refused, and says why."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from furiosa_llm.runtime.artifact.composite import is_composite, open_composite, parse_composite, whole_of_part
from furiosa_llm.runtime.artifact.composite_manifest import CompositeManifest
from furiosa_llm.runtime.artifact.errors import ArtifactError
from furiosa_llm.runtime.artifact.manifest import seal
from furiosa_llm.runtime.artifact.reader import open_artifact
from tests.support.artifacts import artifact_of
from tests.support.runtime.hostile import drop, put

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Bases:
    """Folders that are not to be changed: the composite for 4 PEs and for 8, and an encoder of something else."""

    four: Path
    eight: Path
    bert: Path


@pytest.fixture(scope="module")
def bases() -> Bases:
    four, eight = (artifact_of("tiny-t5-optimum", size) for size in (4, 8))
    return Bases(four=four, eight=eight, bert=artifact_of("tiny-bert-optimum"))


@pytest.fixture
def copy(bases: Bases, tmp_path: Path) -> Path:
    shutil.copytree(bases.four, tmp_path / "artifact")
    return tmp_path / "artifact"


def edit(folder: Path, change: Callable[[Any], object]) -> None:
    """Change the manifest, and give it the digest that it then has."""
    root = json.loads((folder / MANIFEST).read_bytes())
    change(root)
    (folder / MANIFEST).write_bytes(seal(root))


def exchange(folder: Path, part: str, other: Path) -> None:
    """Put another artifact in the place of a part, and say so in the manifest."""
    shutil.rmtree(folder / part)
    shutil.copytree(other, folder / part)
    digest = open_artifact(other).digest
    edit(folder, lambda root: next(p for p in root["parts"] if p["name"] == part).update(digest=digest))


def test_a_sound_one_opens(bases: Bases) -> None:
    composite = open_composite(bases.four, full=True)
    assert list(composite.parts) == ["encoder", "decoder_first", "decoder"]
    assert composite.encoder.digest == composite.manifest.parts[0].digest
    data = (bases.four / MANIFEST).read_bytes()
    assert json.loads(data)["digest"] == composite.digest
    assert parse_composite(data) == composite.manifest
    assert composite.manifest.to_bytes() == data
    constant = [link.input for link in composite.manifest.states if link.output is None]
    assert constant == [f"past_key_values.{n}.encoder.{kv}" for n in (0, 1) for kv in ("key", "value")]


def test_which_folders_are_composites_and_parts(bases: Bases, tmp_path: Path) -> None:
    assert is_composite(bases.four)
    assert whole_of_part(bases.four / "decoder") == bases.four
    for other in (bases.bert, bases.four / "decoder", tmp_path, tmp_path / "none"):
        assert not is_composite(other)
    for other in (bases.bert, bases.four, bases.four / "other"):
        assert whole_of_part(other) is None
    (tmp_path / MANIFEST).write_text("[]")
    assert not is_composite(tmp_path)


EDITS = [
    (put(2, "format", "version"), "version 2; expected 'furiosa-llm-onnx-composite' version 1"),
    (put("furiosa-llm-onnx", "format", "name"), "format 'furiosa-llm-onnx' version 1; expected"),
    (drop("format"), "the key 'format'"),
    (put("decoder-only", "kind"), 'manifest.json $.kind: found "decoder-only", expected one of encoder-decoder'),
    (put(1, "surprise"), "the unknown key 'surprise'"),
    (drop("states"), "the key 'states'"),
    (put([], "states"), "$.parts: found encoder, decoder_first, decoder, expected the parts encoder, decoder"),
    (drop("parts", 1), "expected the parts encoder, decoder_first, decoder, in this order"),
    (put("decoder", "parts", 1, "name"), "found encoder, decoder, decoder, expected the parts"),
    (put("../bert", "parts", 0, "name"), '$.parts[0].name: found "../bert", expected one of encoder'),
    (put("f" * 64, "parts", 2, "digest"), "decoder is not the part that was built with the others"),
    (put("F" * 64, "parts", 2, "digest"), "$.parts[2].digest"),
    (put(-1, "decoder_start_token_id"), "$.decoder_start_token_id: found -1"),
    (put(1024, "decoder_start_token_id"), "has 1024 tokens, but generation begins with 1024"),
    (put(["2"], "eos_token_ids"), "$.eos_token_ids[0]"),
    (put("hidden", "hidden", "output"), "'encoder' does not fit the others: it has no output 'hidden'"),
    (put("hidden", "hidden", "input"), "'decoder_first' does not fit the others: it has no input 'hidden'"),
    (put("input_ids", "hidden", "input"), "takes 'input_ids' INT64 ['batch', 'sequence'], the encoder gives"),
    (drop("states", 0), "has the states ['past_key_values.0.decoder.key', "),
    (put("past", "states", 0, "input"), "has the states ['past_key_values.0.decoder.key', "),
    (put("past_key_values.0.decoder.key", "states", 1, "input"), "an input that item 0 of the list has not taken"),
    (put("present.9.key", "states", 0, "first"), "'decoder_first' does not fit the others: it has no output"),
    (put("logits", "states", 0, "first"), "takes the state 'past_key_values.0.decoder.key' FLOAT"),
    (put("present.1.decoder.key", "states", 0, "output"), "pairs states otherwise"),
    (put(None, "states", 0, "output"), "pairs states otherwise"),
    (put("present.0.decoder.key", "states", 2, "output"), "pairs states otherwise"),
]


@pytest.mark.parametrize(("change", "expected"), EDITS, ids=[change.name for change, _ in EDITS])
def test_a_manifest_that_is_not_right(change: Any, expected: str, copy: Path) -> None:
    edit(copy, change.apply)
    with pytest.raises(ArtifactError, match=re.escape(expected)):
        open_composite(copy)


def test_an_altered_manifest(copy: Path) -> None:
    data = (copy / MANIFEST).read_bytes()
    (copy / MANIFEST).write_bytes(data.replace(b'"decoder_start_token_id": 0', b'"decoder_start_token_id": 1'))
    with pytest.raises(ArtifactError, match=r"manifest\.json was altered: its digest is"):
        open_composite(copy)


def test_parts_that_are_missing_damaged_or_links(copy: Path) -> None:
    (copy / "decoder").rename(copy / "away")
    with pytest.raises(ArtifactError, match=r"no artifact at .*decoder: found nothing"):
        open_composite(copy)
    (copy / "decoder").symlink_to(copy / "away")
    with pytest.raises(ArtifactError, match=r"decoder is a link; copy the artifact with its links followed"):
        open_composite(copy)
    (copy / "decoder").unlink()
    (copy / "away").rename(copy / "decoder")
    weights = copy / "encoder" / "weights-00001.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=r"encoder.weights-00001\.safetensors: found"):
        open_composite(copy)


def test_parts_of_other_artifacts(copy: Path, bases: Bases) -> None:
    exchange(copy, "decoder", bases.eight / "decoder")
    with pytest.raises(
        ArtifactError, match=r"part 'decoder' does not fit.*over PEs \[2, 2, 2\], the encoder over \[2, 2\]"
    ):
        open_composite(copy)
    exchange(copy, "decoder", bases.four / "encoder")
    with pytest.raises(ArtifactError, match=r"part 'decoder' does not fit.*no output for logits"):
        open_composite(copy)
    exchange(copy, "decoder", bases.four / "decoder")
    open_composite(copy)
    exchange(copy, "encoder", bases.bert)
    edit(copy, put("logits", "hidden", "output").apply)
    with pytest.raises(
        ArtifactError,
        match=r"'decoder_first' does not fit.*takes 'encoder_hidden_states' FLOAT \['batch', 'encoder', 64\], the "
        r"encoder gives 'logits' FLOAT \['batch', 'sequence', 1024\]",
    ):
        open_composite(copy)


def test_inputs_that_nothing_feeds(copy: Path, bases: Bases) -> None:
    exchange(copy, "encoder", bases.four / "decoder_first")
    with pytest.raises(ArtifactError, match=r"'encoder' does not fit.*input 'encoder_attention_mask'.*nothing feeds"):
        open_composite(copy)


def test_a_composite_where_a_single_model_is_expected(bases: Bases) -> None:
    with pytest.raises(ArtifactError, match=r"this is a composite artifact.*give the folder of one of its parts"):
        open_artifact(bases.four)


def test_equal_manifests_are_equal_bytes(bases: Bases) -> None:
    manifest = open_composite(bases.four).manifest
    fields = {name: getattr(manifest, name) for name in CompositeManifest.__dataclass_fields__}
    assert CompositeManifest(**fields).to_bytes() == manifest.to_bytes()
