"""The command line on encoders, images and encoder-decoders, and every command of docs/encoders.md."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from furiosa_llm.runtime import SamplingParams
from furiosa_llm.runtime.artifact.composite import open_composite
from furiosa_llm.runtime.encoder import Encoder
from furiosa_llm.runtime.seq2seq import Seq2Seq
from tests.cli.conftest import Cli
from tests.support.artifacts import artifact_of

ROOT = Path(__file__).resolve().parents[2]
Refused = Callable[..., str]


@pytest.fixture(scope="module")
def t5(zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """T5 with a tokenizer of another model, which knows as many tokens."""
    folder = tmp_path_factory.mktemp("t5") / "my-t5"
    shutil.copytree(zoo / "tiny-t5-optimum", folder)
    shutil.copy(zoo / "tiny-llama-optimum" / "tokenizer.json", folder)
    return folder


@pytest.fixture(scope="module")
def built_t5(t5: Path) -> Path:
    return artifact_of("tiny-t5-optimum", beside={"tokenizer.json": (t5 / "tokenizer.json").read_text("utf-8")})


@pytest.fixture
def copy(built_t5: Path, tmp_path: Path) -> Path:
    shutil.copytree(built_t5, tmp_path / "artifact")
    return tmp_path / "artifact"


def test_a_folder_is_built_with_a_table_for_each_part(
    t5: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = cli("build", "-tp", 8, t5)
    assert result.code == 0, result.err
    for part in ("encoder", "decoder_first", "decoder"):
        assert f"{part}: tensor parallel over 8 PEs" in result.out
    assert "my-t5-tp8.artifact: encoder, decoder_first, decoder in one artifact, 2.2 MB of weights" in result.out
    assert result.out.endswith("Artifact Build Completed\n")
    assert open_composite(tmp_path / "my-t5-tp8.artifact").encoder.manifest.mesh.size == 8


def test_tokens_taken_from_the_tokenizer_are_said(t5: Path, tmp_path: Path, cli: Cli, refused: Refused) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("encoder_model.onnx", "decoder_model.onnx"):
        shutil.copy(t5 / name, folder)
    assert "nothing in" in refused("build", folder, tmp_path / "artifact")
    tokenizer = json.loads((t5 / "tokenizer.json").read_text())
    special = {"single": [{"SpecialToken": {"id": "e"}}], "special_tokens": {"e": {"ids": [5]}}}
    (folder / "tokenizer.json").write_text(
        json.dumps(tokenizer | {"padding": {"pad_id": 4}, "post_processor": special})
    )
    result = cli("build", folder, tmp_path / "artifact")
    assert result.code == 0, result.err
    assert "note: no configuration beside the model: the first token 4 was taken from tokenizer.json" in result.out
    assert "the end of a completion (5,) was taken" in result.out


@pytest.mark.slow
def test_verify_inspect_and_generate(t5: Path, copy: Path, cli: Cli) -> None:
    result = cli("verify", copy, "--against", t5, "--tolerance", "1e-5")
    assert result.code == 0, result.out
    assert result.out.count("executor: the executor gives the unsplit model's outputs") == 3
    assert "\nverified: encoder, decoder_first, decoder, and how they fit\n" in result.out
    for part in ("encoder", "decoder_first", "decoder"):
        assert (copy / part / "verification.json").is_file()
    shown = cli("inspect", copy)
    assert "encoder-decoder, begins with token 0, ends at 2; last_hidden_state of the encoder" in shown.out
    assert shown.out.count("passed: static proof") == 3
    described = json.loads(cli("inspect", "--json", copy).out)
    assert described["digest"] == open_composite(copy).digest
    assert described["composite"]["decoder_start_token_id"] == 0
    assert list(described["parts"]) == ["encoder", "decoder_first", "decoder"]
    generated = cli("generate", copy, "--prompt", "hello", "--max-tokens", 6)
    assert generated.code == 0, generated.err
    with Seq2Seq.load_artifact(copy) as model:
        (expected,) = model.generate("hello", SamplingParams(temperature=0.0, max_tokens=6))
    assert generated.out == expected.outputs[0].text + "\n"
    assert "6 tokens" in generated.err


@pytest.mark.slow
def test_damage_is_found_and_named(copy: Path, t5: Path, cli: Cli, refused: Refused) -> None:
    weights = copy / "decoder" / "weights-00001.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    result = cli("verify", "--no-record", copy)
    assert result.code == 1
    assert "weights: FAILED" in result.out
    assert result.out.endswith("NOT verified: encoder, decoder_first, decoder, and how they fit\n")
    shutil.rmtree(copy / "decoder")
    shutil.copytree(copy / "encoder", copy / "decoder")
    other = cli("verify", "--no-record", copy)
    assert other.code == 1
    assert "the parts do not make one whole: " in other.out
    assert "is not the part that was built with the others" in other.out
    shutil.rmtree(copy / "encoder")
    assert "found nothing" in refused("verify", copy)
    assert "expected the files of encoder, decoder_first, decoder" in refused("verify", copy, "--against", t5.parent)


def test_commands_for_single_artifacts_say_to_take_a_part(copy: Path, tmp_path: Path, refused: Refused) -> None:
    for command in (("unbuild", copy, tmp_path / "x.onnx"), ("embed", copy, "--text", "x")):
        assert "give the folder of one of its parts" in refused(*command)
    assert "give the folder of one of its parts" in refused("diff", copy, copy, code=2)
    assert "is a part of the encoder-decoder" in refused("generate", copy / "decoder", "--prompt", "x")
    shutil.rmtree(tmp_path / "artifact" / "encoder")
    assert "found nothing" in refused("generate", copy, "--prompt", "x")


def test_a_part_is_an_artifact(copy: Path, tmp_path: Path, cli: Cli, t5: Path) -> None:
    assert cli("unbuild", copy / "encoder", tmp_path / "encoder.onnx").code == 0
    ids = np.arange(3, 9)[None]
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    found, expected = (
        onnxruntime.InferenceSession(path).run(None, feeds)[0]
        for path in (tmp_path / "encoder.onnx", t5 / "encoder_model.onnx")
    )
    assert np.array_equal(found, expected)


@pytest.mark.slow
def test_embed_prints_a_line_for_each_text(zoo: Path, tmp_path: Path, cli: Cli, refused: Refused) -> None:
    artifact, tokenizer = tmp_path / "artifact", zoo / "tiny-llama-optimum"
    assert cli("build", zoo / "tiny-bert-optimum" / "model.onnx", artifact).code == 0
    result = cli("embed", artifact, "--tokenizer", tokenizer, "--text", "hello", "--text", "some other words")
    assert result.code == 0, result.err
    lines = [json.loads(line) for line in result.out.splitlines()]
    with Encoder.load_artifact(artifact, tokenizer=tokenizer) as encoder:
        expected = [one.outputs.embedding for one in encoder.embed(["hello", "some other words"])]
        plain = encoder.embed("hello", pooling="last", normalize=False)[0].outputs.embedding
    assert lines == expected
    options = ("--pooling", "last", "--no-normalize")
    assert json.loads(cli("embed", artifact, "--tokenizer", tokenizer, "--text", "hello", *options).out) == plain
    long = ("embed", artifact, "--tokenizer", tokenizer, "--text", "word " * 600)
    assert "the model takes at most 512" in refused(*long)
    assert cli(*long, "--truncate").code == 0
    assert "no tokenizer.json" in refused("embed", artifact, "--text", "hello")


@pytest.mark.slow
def test_the_documentation_s_commands(tmp_path: Path, zoo: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs" / "encoders.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    commands = [shlex.split(line) for line in "".join(blocks).splitlines()]
    (tmp_path / "fixtures").symlink_to(ROOT / "fixtures")
    monkeypatch.chdir(tmp_path)
    printed = ""
    for name, *arguments in commands:
        if name == "python":
            subprocess.run([sys.executable, *arguments], check=True, timeout=60)
            continue
        assert name == "furiosa-llm"
        result = cli(*arguments)
        assert result.code == 0, result.err
        printed += result.out
    assert len(commands) == 7
    assert "logits: float32 [1, 10]" in printed
    assert "verified: encoder, decoder_first, decoder, and how they fit" in printed
    session = onnxruntime.InferenceSession(zoo / "tiny-vit-optimum" / "model.onnx")
    image = np.load(tmp_path / "image.npz")["pixel_values"]
    (expected,) = session.run(["logits"], {"pixel_values": image})
    found = np.load(tmp_path / "scores.npz")["logits"]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * float(np.abs(expected).max()))
    assert open_composite(tmp_path / "t5-tp8.artifact").decoder.manifest.mesh.size == 8
