"""The command line on small models of three exporters, and what it says of bad input."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from furiosa_llm.cli.build import default_output
from furiosa_llm.runtime import open_artifact
from furiosa_llm.runtime.artifact.units import nbytes
from tests.cli.conftest import OPTIMUM, Cli
from tests.support.artifacts import artifact_of
from tests.support.tiers import tiered

DYNAMO, GENAI = "tiny-llama-dynamo-op23-tf5", "tiny-llama-genai-fp32"


@pytest.mark.parametrize(
    ("name", "tensor_parallel_size"),
    tiered([(name, size) for name in (OPTIMUM, DYNAMO, GENAI) for size in (4, 8)], [(OPTIMUM, 4)]),
)
def test_build_and_verify(name: str, tensor_parallel_size: int, zoo: Path, tmp_path: Path, cli: Cli) -> None:
    model, artifact = zoo / name / "model.onnx", tmp_path / "artifact"
    result = cli("build", "-tp", tensor_parallel_size, model, artifact)
    assert result.code == 0
    assert "5 AllReduce, 1 AllGather" in result.out
    assert result.out.endswith("Artifact Build Completed\n")
    verified = cli("verify", artifact, "--against", model, "--tolerance", "1e-5", "--max-tokens", 8, "--verbose")
    assert verified.code == 0, verified.out
    counted = re.search(r"executor: the executor gives the unsplit model's outputs \((\d+) outputs", verified.out)
    assert counted is not None
    assert int(counted[1]) > 15, "logits and four caches at three lengths, and at those that are drawn"
    assert "tolerance 1e-05" in verified.out
    for case in ("prefill", "decode", "chunk"):
        assert case in verified.out


@pytest.mark.parametrize(
    "option", tiered(["-tp", "--tensor-parallel-size", "--tensor_parallel_size"], ["--tensor_parallel_size"])
)
def test_spellings_of_the_size(option: str, zoo: Path, tmp_path: Path, cli: Cli) -> None:
    assert cli("build", option, 8, zoo / GENAI / "model.onnx", tmp_path / "artifact").code == 0
    assert open_artifact(tmp_path / "artifact").manifest.mesh.size == 8


def test_default_size_and_output(zoo: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli("build", zoo / GENAI / "model.onnx").code == 0
    assert open_artifact(tmp_path / f"{GENAI}-tp4.artifact").manifest.mesh.size == 4
    assert default_output(Path("some/llama.onnx"), 8) == Path("llama-tp8.artifact")


def test_generate_gives_the_same_tokens_for_every_size(cli: Cli) -> None:
    texts = set()
    for size in (4, 8):
        result = cli("generate", artifact_of(OPTIMUM, size), "--prompt", "hello", "--max-tokens", 12)
        assert result.code == 0
        assert "12 tokens" in result.err
        texts.add(result.out)
    assert len(texts) == 1
    assert texts.pop().strip()


@pytest.mark.slow
def test_run_gives_the_model_s_outputs(zoo: Path, tmp_path: Path, cli: Cli) -> None:
    model = zoo / "tiny-bert-optimum" / "model.onnx"
    ids = np.arange(10, dtype=np.int64)[None, :]
    mask, types = np.ones_like(ids), np.zeros_like(ids)
    np.savez(tmp_path / "in.npz", input_ids=ids, attention_mask=mask, token_type_ids=types)
    result = cli(
        "run", artifact_of("tiny-bert-optimum", 8), "--inputs", tmp_path / "in.npz", "--outputs", tmp_path / "out.npz"
    )
    assert result.code == 0, result.err
    assert result.out == "logits: float32 [1, 10, 1024]\n"
    import onnxruntime

    session = onnxruntime.InferenceSession(model)
    (expected,) = session.run(None, {"input_ids": ids, "attention_mask": mask, "token_type_ids": types})
    found = np.load(tmp_path / "out.npz")["logits"]
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-5 * float(np.abs(expected).max()))


def test_wrong_size(zoo: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    model = zoo / GENAI / "model.onnx"
    for size in (0, 3, 6, 32, -4):
        message = refused("build", "-tp", size, model, tmp_path / "artifact", code=2)
        assert f"size {size} is not supported" in message
        assert "4 or 8" in message
    assert "--experimental-tp" in refused("build", "-tp", 2, model, tmp_path / "artifact", code=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", tiered([1, 2, 16], [2]))
def test_experimental_sizes(size: int, zoo: Path, tmp_path: Path, cli: Cli) -> None:
    model, artifact = zoo / "tiny-llama-mha-tied-optimum" / "model.onnx", tmp_path / "artifact"
    assert cli("build", "--experimental-tp", "-tp", size, model, artifact).code == 0
    assert cli("verify", artifact, "--against", model, "--tolerance", "1e-5").code == 0


def test_usage_errors(cli: Cli, tmp_path: Path) -> None:
    assert cli("build").code == 2
    assert cli("build", "--no-such-option", "x.onnx").code == 2
    assert cli("build", "-tp", "four", "x.onnx").code == 2
    assert cli("build", "--dim", "height=0", "x.onnx").code == 2
    assert cli("generate", tmp_path).code == 2
    assert cli("frobnicate").code == 2
    assert cli("--help").code == 0
    assert cli("--version").out.startswith("furiosa-llm ")


def test_existing_output_needs_force(zoo: Path, tmp_path: Path, cli: Cli, refused: Callable[..., str]) -> None:
    model, artifact = zoo / GENAI / "model.onnx", tmp_path / "artifact"
    assert cli("build", model, artifact).code == 0
    before = (artifact / "manifest.json").read_bytes()
    assert "--force" in refused("build", "-tp", 8, model, artifact)
    assert (artifact / "manifest.json").read_bytes() == before
    assert cli("build", "-tp", 8, "--force", model, artifact).code == 0
    assert open_artifact(artifact).manifest.mesh.size == 8
    assert [entry.name for entry in tmp_path.iterdir()] == ["artifact"]


def test_model_that_is_not_there_or_not_onnx(tmp_path: Path, refused: Callable[..., str]) -> None:
    assert "does not exist" in refused("build", tmp_path / "none.onnx", tmp_path / "artifact")
    (tmp_path / "text.onnx").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "is not an ONNX model" in refused("build", tmp_path / "text.onnx", tmp_path / "artifact")
    assert not (tmp_path / "artifact").exists()


def test_merged_decoder_is_refused_with_the_files_to_take(
    zoo: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    message = refused("build", zoo / "tiny-t5-optimum" / "decoder_model_merged.onnx", tmp_path / "artifact")
    assert "decoder_model.onnx" in message
    assert "decoder_with_past_model.onnx" in message


@pytest.mark.parametrize("name", ["manifest.json", "program.onnx", "weights-00001.safetensors"])
def test_damaged_artifact(name: str, built: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    artifact = tmp_path / "artifact"
    for damage in ("missing", "truncated", "altered"):
        shutil.rmtree(artifact, ignore_errors=True)
        shutil.copytree(built, artifact)
        file = artifact / name
        data = bytearray(file.read_bytes())
        if damage == "missing":
            file.unlink()
        elif damage == "truncated":
            file.write_bytes(data[: len(data) // 2])
        else:
            data[20] ^= 0xFF
            file.write_bytes(data)
        message = refused("generate", artifact, "--prompt", "hello")
        assert name in message, damage
        assert "furiosa-llm build" in message, damage


def test_not_an_artifact(tmp_path: Path, zoo: Path, refused: Callable[..., str]) -> None:
    assert "furiosa-llm build" in refused("generate", tmp_path / "none", "--prompt", "hello")
    assert "furiosa-llm build" in refused("generate", zoo / OPTIMUM, "--prompt", "hello")


def test_prompt_longer_than_the_limit(zoo: Path, tmp_path: Path, cli: Cli, refused: Callable[..., str]) -> None:
    artifact = tmp_path / "artifact"
    assert cli("build", "--max-seq-len-to-capture", 16, zoo / OPTIMUM / "model.onnx", artifact).code == 0
    message = refused("generate", artifact, "--prompt", "hello world " * 40, "--max-tokens", 4)
    assert "maximum input context length is 15 tokens" in message


def test_inputs_that_do_not_fit(built: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    outputs = tmp_path / "out.npz"
    assert "does not exist" in refused("run", built, "--inputs", tmp_path / "none.npz", "--outputs", outputs)
    (tmp_path / "text.npz").write_text("not an archive")
    assert "is not an .npz file" in refused("run", built, "--inputs", tmp_path / "text.npz", "--outputs", outputs)
    np.savez(tmp_path / "few.npz", input_ids=np.ones((1, 3), np.int64))
    assert "attention_mask" in refused("run", built, "--inputs", tmp_path / "few.npz", "--outputs", outputs)
    assert not outputs.exists()


def test_generating_with_an_encoder(zoo: Path, tmp_path: Path, cli: Cli, refused: Callable[..., str]) -> None:
    assert cli("build", zoo / "tiny-bert-optimum" / "model.onnx", tmp_path / "artifact").code == 0
    assert "furiosa-llm run" in refused("generate", tmp_path / "artifact", "--prompt", "hello")


def test_sampling_parameters_out_of_range(built: Path, refused: Callable[..., str]) -> None:
    assert "temperature" in refused("generate", built, "--prompt", "x", "--temperature", "-1")
    assert "max_tokens" in refused("generate", built, "--prompt", "x", "--max-tokens", "0")


def test_the_plan_is_in_the_manifest(built: Path) -> None:
    plan = json.loads((built / "manifest.json").read_text())["plan"]
    assert plan["price"]["collectives"] == 6
    assert {choice["size"] for choice in plan["choices"]} == {1024, 176, 2}
    assert all(refusal["reason"] for refusal in plan["refused"])
    assert plan["padding_nbytes"] == 0


def test_units() -> None:
    assert [nbytes(n) for n in (0, 999, 1500, 123_456, 5.4e8)] == ["0 B", "999 B", "1.5 kB", "123 kB", "540 MB"]


# -- plan ----------------------------------------------------------------------------------------------------------


def test_plan_answers_first(cli: Cli, zoo: Path) -> None:
    """A replica at tp 4 has half a card: two of them hold what one at tp 8 does, but for the weights."""
    result = cli("plan", zoo / OPTIMUM / "model.onnx", "--context", 4096, "--cards", 3)
    assert result.code == 0
    lines = result.out.splitlines()
    assert lines[0].endswith("of float32; KV cache float32")
    assert re.fullmatch(r"Fits on 3 cards at tp 4: [0-9,]+ sequences of 4,096 tokens\.", lines[1])
    assert lines[2].startswith("Fits on 3 cards at tp 8: ")
    assert len(lines) <= 40
    assert max(map(len, lines[1:])) <= 80
    rooms = lines[lines.index("tp 8: sequences at once, by cards and tokens of each") + 1 :]
    assert rooms[0].split() == ["cards", "256", "1,024", "4,096"]
    assert re.fullmatch(r"3( +[0-9,]+){3}", rooms[2])


def test_a_plan_that_does_not_fit_says_by_how_much_and_what_would(cli: Cli, zoo: Path) -> None:
    model = zoo / OPTIMUM / "model.onnx"
    result = cli("plan", model, "-tp", 8, "--cards", 1, "--batch", 1000, "--context", 10**6)
    assert result.code == 1
    (verdict,) = (line for line in result.out.splitlines() if line.startswith("Does not fit"))
    found = re.fullmatch(
        r"Does not fit on 1 card at tp 8: 1000 sequences of 1,000,000 tokens would need .* more on a PE; "
        r"it fits with --context ([0-9]+)\.",
        verdict,
    )
    assert found
    assert cli("plan", model, "-tp", 8, "--cards", 1, "--batch", 1000, "--context", found[1]).code == 0
    one_more = cli("plan", model, "-tp", 8, "--cards", 1, "--batch", 1000, "--context", int(found[1]) + 1, "--json")
    assert one_more.code == 1
    assert json.loads(one_more.out)["plans"][0]["fewest"] is None
    assert cli("plan", model, "-tp", "4,8", "--cards", 1, "--batch", 1000, "--context", found[1]).code == 0


def test_plan_explains_with_reasons(cli: Cli, zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    result = cli("plan", zoo / "tiny-qwen2-14-2-optimum" / "model.onnx", "--context", 64, "--explain")
    assert result.code == 0
    text = " ".join(result.out.replace("│", " ").split())
    for said in ("context 64", "tp 4: what is split, and why", "tp 8: what is split", "query heads per key/value head"):
        assert said in text
    assert "7 padded to 8, +14%" in text
    assert "not over 4" in text
    assert "1 AllGather over 8" in text


def test_plan_warns_of_what_no_table_counts(zoo: Path, cli: Cli) -> None:
    model = zoo / OPTIMUM / "model.onnx"
    warning = (
        r"tp 4: .* GB are alive inside a step, most of them \S+ \(\w+\), which neither these figures nor the engine"
    )
    assert re.search(warning, cli("plan", model, "-tp", "4", "--batch", 10**7).out)
    assert not re.search(warning, cli("plan", model, "-tp", "4").out)


def test_plan_as_json(cli: Cli, zoo: Path) -> None:
    result = cli("plan", zoo / GENAI / "model.onnx", "-tp", "8", "--batch", 2, "--json")
    assert result.code == 0
    found = json.loads(result.out)
    assert [plan["tensor_parallel_size"] for plan in found["plans"]] == [8]
    assert found["workload"]["batch"] == 2


def test_plan_and_build_take_tactics(cli: Cli, zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    tactics = tmp_path / "mine.toml"
    tactics.write_text('[[tactic]]\nrole = "vocabulary"\nplace = "replicate"\n')
    result = cli("plan", zoo / OPTIMUM / "model.onnx", "-tp", "4", "--tactics", tactics, "--explain")
    assert "tactic 1 of mine.toml" in " ".join(result.out.replace("│", " ").split())
    built = cli("build", zoo / OPTIMUM / "model.onnx", tmp_path / "out", "--tactics", tactics)
    assert built.code == 0


def test_plan_refuses_what_it_cannot(refused: Callable[..., str], zoo: Path, tmp_path: Path) -> None:
    model = zoo / OPTIMUM / "model.onnx"
    assert "tensor parallel size 3 is not supported" in refused("plan", model, "-tp", "4,3", code=2)
    assert "context must be an integer of at least 1, got 0" in refused("plan", model, "--context", 0, code=2)
    assert "does not exist" in refused("plan", tmp_path / "none.onnx")
    assert "cannot be read" in refused("plan", model, "--tactics", tmp_path / "none.toml")


def test_plan_takes_lists_of_sizes_only(cli: Cli, zoo: Path) -> None:
    result = cli("plan", zoo / OPTIMUM / "model.onnx", "-tp", "four")
    assert result.code == 2
    assert "'four' is not a list of sizes, for instance 4,8" in result.err


def test_plan_writes_annotations_that_check(cli: Cli, refused: Callable[..., str], zoo: Path, tmp_path: Path) -> None:
    model = zoo / OPTIMUM / "model.onnx"
    out = tmp_path / "annotated.onnx"
    assert cli("plan", model, "-tp", "4", "-pp", 2, "--emit-onnx", out, "--json").code == 0
    checked = cli("check-sharding", out)
    assert (checked.code, "errors: 0" in checked.out) == (0, True)
    assert "--emit-onnx writes one plan, got the sizes [4, 8]" in refused("plan", model, "--emit-onnx", out, code=2)
    more = tmp_path / "more.onnx"
    assert "3 stages are more than the 2 blocks" in refused(
        "plan", model, "-tp", "4", "-pp", 3, "--emit-onnx", more, code=2
    )
    assert not more.exists()


def test_planning_says_what_it_does(zoo: Path, cli: Cli) -> None:
    """On standard error, where it is asked to; standard output has the figures alone."""
    result = cli("plan", zoo / OPTIMUM / "model.onnx", "-tp", 4, "--progress", "--json")
    assert list(dict.fromkeys(line.partition(": ")[0] for line in result.err.splitlines())) == [
        "starting",
        "reading the graph",
        "finding what depends on what",
        "choosing what to split",
        "writing the program",
        "placing the model on cards, tp 4",
    ]
    assert json.loads(result.out)["plans"]
