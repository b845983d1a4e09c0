"""Real exporters' graphs, end to end: build, load, run on simulated PEs, and compare with the unsplit model.

Prefill, decode and a chunk; logits and every present KV. The collectives are those of the hand-written plan: for L
layers 2L+1 AllReduce and one AllGather, L+1 where attention and feed-forward are side by side.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from furiosa_llm import ArtifactBuilder
from furiosa_llm.runtime import verify_against
from tests.support.artifacts import built_model
from tests.support.tiers import MECHANISMS, tiered

pytestmark = pytest.mark.kernels

FP32, FP16 = 1e-5, 5e-3
L = 2

COUNTS: dict[str, tuple[int, int]] = {
    "tiny-bert-optimum": (2 * L + 2, 1),
    "tiny-bloom-optimum": (2 * L + 1, 1),
    "tiny-gemma-optimum": (2 * L + 1, 1),
    "tiny-gemma2-genai-fp32-fullkv": (2 * L + 1, 1),
    "tiny-gpt2-dynamo-tf5": (2 * L + 1, 1),
    "tiny-gpt2-optimum": (2 * L + 1, 1),
    "tiny-gptoss-genai-fp32-fullkv": (2 * L + 1, 1),
    "tiny-llama-9-3-optimum": (2 * L + 1, 1),
    "tiny-llama-dynamo-op23-tf5": (2 * L + 1, 1),
    "tiny-llama-dynamo-tf5": (2 * L + 1, 1),
    "tiny-llama-genai-fp16-cuda": (2 * L + 1, 1),
    "tiny-llama-genai-fp32": (2 * L + 1, 1),
    "tiny-llama-genai-int4": (2 * L + 1, 1),
    "tiny-llama-genai-int4-qdq": (2 * L + 1, 1),
    "tiny-llama-genai-int8": (2 * L + 1, 1),
    "tiny-llama-mha-tied-optimum": (2 * L + 1, 1),
    "tiny-llama-optimum": (2 * L + 1, 1),
    "tiny-llama-tied-genai-int4-shared": (2 * L + 1, 1),
    "tiny-mistral-dynamo-tf5": (2 * L + 1, 1),
    "tiny-mixtral-dynamo-tf5": (2 * L + 1, 1),
    "tiny-neox-optimum": (L + 1, 1),
    "tiny-phi3-optimum": (2 * L + 1, 1),
    "tiny-qwen2-14-2-optimum": (2 * L + 1, 1),
    "tiny-qwen2-genai-int4": (2 * L + 1, 1),
    "tiny-qwen2-optimum": (2 * L + 1, 1),
    "tiny-qwen3-optimum": (2 * L + 1, 1),
    "tiny-qwen3moe-optimum": (2 * L + 1, 1),
    "tiny-t5-optimum/decoder_model.onnx": (3 * L + 1, 1),
    "tiny-t5-optimum/decoder_with_past_model.onnx": (3 * L + 1, 1),
    "tiny-t5-optimum/encoder_model.onnx": (2 * L + 1, 0),
    "tiny-vit-optimum": (2 * L, 0),
}
"""Model -> AllReduce and AllGather per forward pass, the same for 4 and 8 PEs."""

ROWS = tiered([(name, size) for name in COUNTS for size in (4, 8)], MECHANISMS)
SIZES = {"encoder": 6}


def _model(zoo: Path, name: str) -> Path:
    return zoo / name if name.endswith(".onnx") else zoo / name / "model.onnx"


@pytest.mark.parametrize(("name", "tensor_parallel_size"), ROWS)
def test_split_model_equals_the_whole(name: str, tensor_parallel_size: int, zoo: Path) -> None:
    model, built = _model(zoo, name), built_model(name, tensor_parallel_size)
    report = built.report
    assert (report.collectives.get("AllReduce", 0), report.collectives.get("AllGather", 0)) == COUNTS[name]
    assert report.weight_nbytes < report.model_nbytes
    found = verify_against(built.folder, model, sizes=SIZES, max_tokens=4, max_length=100)
    cases = {error.case.split()[0] for error in found.outputs}
    is_step = any("past" in name for name in _input_names(model))
    assert cases == ({"prefill", "decode", "chunk"} if is_step else {"forward"})
    tolerance = FP16 if "fp16" in name else FP32
    worst = max(found.outputs, key=lambda error: error.relative)
    assert all(error.finite for error in found.outputs)
    assert worst.relative <= tolerance, worst
    assert all(error.within(tolerance) for error in found.engine)
    assert all(one.within(tolerance) for one in found.tokens)


@pytest.mark.parametrize(
    "name",
    tiered(["tiny-llama-9-3-optimum", "tiny-bloom-optimum", "tiny-llama-dynamo-op23-tf5"], ["tiny-llama-9-3-optimum"]),
)
def test_split_model_without_fused_attention(name: str, zoo: Path, tmp_path: Path) -> None:
    model = _model(zoo, name)
    report = ArtifactBuilder(model, fuse_attention=False).build(tmp_path / "artifact")
    assert (report.collectives["AllReduce"], report.collectives["AllGather"]) == COUNTS[name]
    found = verify_against(tmp_path / "artifact", model, max_tokens=4, max_length=100)
    assert {error.case.split()[0] for error in found.outputs} == {"prefill", "decode", "chunk"}
    assert found.within(FP32)


def _input_names(model: Path) -> list[str]:
    import onnx

    return [value.name for value in onnx.load(model, load_external_data=False).graph.input]


def test_every_model_of_the_zoo_is_tested(zoo: Path) -> None:
    tested = {name.split("/")[0] for name in COUNTS}
    assert {folder.name for folder in zoo.iterdir() if folder.is_dir()} == tested
